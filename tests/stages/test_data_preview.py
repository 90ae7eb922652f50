"""recipe=data_preview through the pipeline: what it writes and says, without a model."""

import json
from pathlib import Path

import jsonschema
import pytest
from omegaconf import OmegaConf
from pipeline_cases import settings, write_data
from rich.console import Console

from qatlora import pipeline
from qatlora.paths import shipped
from qatlora.report.console import to_console
from qatlora.report.json_report import load_schema
from qatlora.report.results import RunReport


@pytest.fixture
def preview_run(tiny_gemma3_folder, tmp_path, monkeypatch) -> tuple[RunReport, Path]:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"called with {arguments}")

    monkeypatch.setattr("qatlora.stages.preflight.check_converter", refuse)
    for function in ("load_data", "load_base"):
        monkeypatch.setattr(pipeline, function, refuse)
    monkeypatch.setattr("qatlora.base.source.Source.tensor", refuse)
    cfg = settings(tiny_gemma3_folder, write_data(tmp_path), tmp_path / "run")
    cfg.stages = list(OmegaConf.load(shipped("recipes") / "data_preview.yaml").stages)
    cfg.data.max_length_tokens = 100
    return pipeline.run(cfg), tmp_path / "run"


def test_report_json_is_valid_and_report_md_shows_marks_and_lengths(preview_run):
    report, folder = preview_run
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, load_schema())
    assert document["preview"]["examined"] == 60
    assert document["preview"]["format"] == "messages"
    assert len(document["preview"]["examples"]) == 3
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.count("⟦The number is ") == 3
    assert "![Lengths of the conversations](lengths.png)" in text
    assert (folder / "lengths.png").is_file()
    assert report.base.digest is None


def test_the_terminal_shows_trained_tokens_in_colour_and_between_marks(preview_run):
    report, _ = preview_run
    plain, coloured = Console(width=80), Console(width=80, force_terminal=True)
    with plain.capture() as captured:
        plain.print(to_console(report))
    text = captured.get()
    assert text.count("⟦The number is ") == 3
    assert "60 conversations, format messages" in text
    assert "Nothing was cut or left out." in text
    assert "█" in text
    with coloured.capture() as captured:
        coloured.print(to_console(report))
    assert "\x1b[1;32m⟦The number is " in captured.get()
