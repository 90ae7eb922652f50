"""recipe=inspect through the pipeline: what it writes, says, and does without."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from loaded_cases import edit_tensors, edited_folder, on_grid_folder
from omegaconf import OmegaConf
from rich.console import Console

from qatlora import pipeline
from qatlora.config import RootConfig
from qatlora.config.rules import validate
from qatlora.errors import CheckpointError, ConfigError
from qatlora.paths import shipped
from qatlora.report.console import to_console
from qatlora.report.json_report import load_schema
from qatlora.report.results import RunReport

HEAD = "lm_head.weight"


def settings(base: Path, run_dir: Path, against: Path | None = None) -> RootConfig:
    cfg = RootConfig(run_dir=str(run_dir))
    cfg.stages = list(OmegaConf.load(shipped("recipes") / "inspect.yaml").stages)
    cfg.card.name = "inspect"
    cfg.base.path, cfg.base.name = str(base), "tiny"
    cfg.inspect.against = None if against is None else str(against)
    cfg.logging.progress_bars = False
    return cfg


def said(report: RunReport) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(to_console(report))
    return captured.get()


def run(cfg: RootConfig) -> tuple[RunReport, dict, str]:
    """The report, report.json (valid), and report.md."""
    report = pipeline.run(cfg)
    folder = Path(cfg.run_dir)
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, load_schema())
    return report, document, (folder / "report.md").read_text(encoding="utf-8")


def test_a_checkpoint_on_a_grid_is_reported_with_what_to_use(tiny_llama_folder, tmp_path):
    on_grid_folder(tiny_llama_folder, tmp_path / "on")
    report, document, markdown = run(settings(tmp_path / "on", tmp_path / "run"))
    inspect = document["inspect"]
    assert inspect["on_grid_share"] == document["base"]["on_grid_share"] == 1
    assert set(inspect["tensors"][0]) >= {
        "name", "blocks", "on_grid_share", "peak_levels", "error_reference", "error_ours"
    }  # fmt: skip
    assert all(len(tensor["peak_levels"]) == 8 for tensor in inspect["tensors"])
    assert document["base"]["digest"] is None
    assert "On a Q4_0 grid" in markdown
    assert "storage=q4_0" in markdown
    assert "inspect.png" in markdown
    assert (tmp_path / "run" / "inspect.png").is_file()
    assert "llama-quantize" in said(report)


def test_an_ordinary_checkpoint_is_reported_as_latent(tiny_gemma3_folder, tmp_path):
    report, document, markdown = run(settings(tiny_gemma3_folder, tmp_path))
    assert document["inspect"]["on_grid_share"] == 0
    assert document["inspect"]["kind"] == "off_grid"
    assert "Not on a Q4_0 grid" in markdown
    assert "storage=nf4" in " ".join(said(report).split())


def test_an_edit_is_reported_against_its_original(tiny_gemma3_folder, tmp_path):
    on_grid_folder(tiny_gemma3_folder, tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    name = "model.layers.1.self_attn.q_proj.weight"
    edited = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    edit_tensors(tmp_path / "after", {name: edited, HEAD: torch.zeros(384, 64).bfloat16()})
    report, document, markdown = run(
        settings(tmp_path / "after", tmp_path / "run", tmp_path / "before")
    )
    comparison = document["inspect"]["comparison"]
    assert document["inspect"]["kind"] == "partly"
    assert [edit["name"] for edit in comparison["edits"]] == [name]
    assert comparison["edits"][0]["on_grid_before"] == 1
    assert comparison["edits"][0]["on_grid_after"] == 0
    assert comparison["stray"] == [HEAD]
    text = " ".join(said(report).split())
    assert "off the grid" in text
    assert HEAD in text
    assert "unties" in markdown


def test_neither_tokenizer_nor_converter_nor_data_is_needed(
    tiny_llama_folder, tmp_path, monkeypatch
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama_folder / file, bare / file)

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"called with {arguments}")

    for function in ("check_converter", "load_tokenizer"):
        monkeypatch.setattr(f"qatlora.stages.preflight.{function}", refuse)
    for function in ("load_data", "load_base"):
        monkeypatch.setattr(pipeline, function, refuse)
    run(settings(bare, tmp_path / "run"))


def test_another_architecture_is_refused_before_any_tensor_is_read(
    tiny_gemma3_folder, tiny_llama_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("qatlora.base.source.Source.tensor", None)
    cfg = settings(tiny_gemma3_folder, tmp_path, against=tiny_llama_folder)
    with pytest.raises(CheckpointError, match="only checkpoints of one architecture"):
        pipeline.run(cfg)


def test_a_checkpoint_that_lacks_a_layer_is_refused_before_any_tensor_is_read(
    tiny_gemma3_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("qatlora.base.source.Source.tensor", None)
    layers = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    folder = edited_folder(tiny_gemma3_folder, tmp_path / "long", **layers)
    with pytest.raises(CheckpointError, match="has no tensor 'model.layers.2"):
        pipeline.run(settings(folder, tmp_path / "run"))


def test_a_folder_to_compare_with_must_exist(tiny_gemma3_folder, tmp_path):
    cfg = settings(tiny_gemma3_folder, tmp_path, against=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"inspect\.against=.*nowhere: no such folder"):
        validate(cfg)
