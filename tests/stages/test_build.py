"""Built folders in the pipeline: training on them, exporting from their source, refusals."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from loaded_cases import built_folder, on_grid_folder
from pipeline_cases import STAGES, settings

from qatlora import pipeline
from qatlora.base.source import read_source
from qatlora.config import Storage
from qatlora.errors import CheckpointError, ConfigError, ExportError
from qatlora.export.checkpoint import require_plain
from qatlora.files import SUMS
from qatlora.inspection.tensors import require_weights
from qatlora.report.results import RunReport


@pytest.mark.llama_cpp
def test_an_adapter_trained_on_a_packed_build_is_exported_from_its_source_alike(
    tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    on_grid_folder(tiny_gemma3_folder, tmp_path / "bf16")
    built_folder(tmp_path / "bf16", tmp_path / "packed", "q4_0")
    cfg = settings(tmp_path / "packed", files, tmp_path / "first")
    cfg.storage.kind = Storage.q4_0
    first = pipeline.run(cfg)
    again = settings(tmp_path / "bf16", files, tmp_path / "again")
    again.storage.kind = Storage.q4_0
    again.stages = [name for name in STAGES if name not in ("train", "save_adapter")]
    again.adapter.path = str(tmp_path / "first" / "adapter")
    second = pipeline.run(again)
    assert first.base == second.base
    assert first.guard.passed
    assert first.texts["task"] == second.texts["task"]  # its teacher, too: it is on the grid
    assert first.texts["task"]["merged"].kld is not None


@pytest.mark.llama_cpp
def test_an_nf4_build_is_trained_and_published(
    tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    built_folder(tiny_llama_folder, tmp_path / "nf4", "nf4")
    cfg = settings(tmp_path / "nf4", files, tmp_path / "run")
    cfg.teacher.path = str(tiny_llama_folder)
    report = pipeline.run(cfg)
    assert report.guard.passed
    assert report.texts["task"]["merged"] == report.texts["task"]["trained"]


@pytest.mark.parametrize("kind", ["q4_0", "nf4"])
def test_a_build_that_has_no_bf16_values_any_more_is_no_teacher(
    kind: str, tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    built_folder(tiny_llama_folder, tmp_path / "build", kind)
    cfg = settings(tmp_path / "build", files, tmp_path / "run")
    cfg.storage.kind = Storage[kind]
    with pytest.raises(
        ConfigError, match="teacher.path=FOLDER of the bf16 checkpoint.*teacher=none"
    ):
        pipeline.run(cfg)


def test_there_is_nothing_to_build_in_bf16(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to build.*Use recipe=q4_0_build"):
        built_folder(tiny_llama_folder, tmp_path / "build", "bf16")


def test_without_a_path_the_folder_lies_in_the_run_folder(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    report = built_folder(tiny_llama_folder, tmp_path / "build", "q4_0", path=None)
    assert Path(report.build.path) == tmp_path / "build-run" / "tiny-Q4_0"
    assert (tmp_path / "build-run" / "tiny-Q4_0" / "grid.json").is_file()


def with_table(base: Path, target: Path, kind: str, text: Path, **fidelity: Any) -> RunReport:
    """As `built_folder`, with the table of the recipe on a short text."""
    fidelity = {"texts": [str(text)], "tokens_per_text": 200, "window_tokens": 64} | fidelity
    stages = ["preflight", "build", "fidelity", "report"]
    return built_folder(base, target, kind, stages=stages, fidelity=fidelity)


@pytest.mark.parametrize("kind", ["q4_0", "nf4"])
def test_the_card_has_the_fidelity_of_the_folder_beside_other_storages(
    kind: str, tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_folder, tmp_path / "before_qat")
    report = with_table(
        tiny_llama_folder, tmp_path / "b", kind, files["text"], vanilla=str(tmp_path / "before_qat")
    )
    titles = [model.title for model in report.fidelity.models]
    assert titles == ["vanilla → NF4", "QAT → NF4", "QAT → Q4_0 ours", "QAT → Q4_0 reference"]
    vanilla, nf4, *_ = report.fidelity.models
    assert vanilla.texts == nf4.texts  # the same weights, one of them in the folder
    card = (tmp_path / "b" / "README.md").read_text("utf-8")
    assert "## Fidelity" in card
    assert all(title in card for title in titles)
    built = next(model for model in report.fidelity.models if model.given == kind)
    assert built.bytes == read_source(tmp_path / "b", "tiny").weight_bytes  # of the folder itself


def test_a_build_goes_on_without_a_table_where_there_is_no_memory_for_one(
    tiny_llama_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("qatlora.stages.fidelity.lacking_memory", lambda *_: "62 GB are needed")
    report = with_table(tiny_llama_folder, tmp_path / "build", "q4_0", files["text"])
    assert "There will be no fidelity table: to measure it, 62 GB" in "".join(capsys.readouterr())
    assert report.fidelity is None
    assert "## Fidelity" not in (tmp_path / "build" / "README.md").read_text("utf-8")


def test_a_build_that_was_killed_before_its_report_is_made_again(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    built_folder(tiny_llama_folder, tmp_path / "build", "q4_0", path=None)
    sums = tmp_path / "build-run" / "tiny-Q4_0" / SUMS
    whole = sums.read_bytes()
    with pytest.raises(ConfigError, match="exists already, and a build never replaces a folder"):
        built_folder(tiny_llama_folder, tmp_path / "build", "q4_0", path=None)
    (tmp_path / "build-run" / "report.json").unlink()
    sums.unlink()
    built_folder(tiny_llama_folder, tmp_path / "build", "q4_0", path=None)
    assert sums.read_bytes() == whole


@pytest.mark.parametrize("kind", ["q4_0", "nf4"])
def test_recipes_that_read_bf16_weights_refuse_a_build(
    kind: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    built_folder(tiny_llama_folder, tmp_path / "build", kind)
    source = read_source(tmp_path / "build", "tiny")
    with pytest.raises(CheckpointError, match="Inspect (the|that) bf16 checkpoint"):
        require_weights(source, [])
    with pytest.raises(ExportError, match="Give base.path of the bf16 checkpoint"):
        require_plain(source)
