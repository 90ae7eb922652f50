"""The whole main path on tiny models: every storage and adapter, the guard, resume, refusals."""

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from pipeline_cases import STAGES, settings

from qatlora import pipeline
from qatlora.base.linear import compute_dtype
from qatlora.config import AdapterKind, Precision, Rounding, Storage, TeacherKind
from qatlora.errors import AdapterError, GuardFailed
from qatlora.report.json_report import load_schema

CASES = [
    (Storage.nf4, AdapterKind.lora, Rounding.frozen),
    (Storage.q4_0, AdapterKind.lora, Rounding.frozen),
    (Storage.bf16, AdapterKind.lora, Rounding.reference),
    (Storage.q4_0, AdapterKind.steps, Rounding.frozen),
    (Storage.nf4, AdapterKind.both, Rounding.frozen),
]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(part.name for part in case))
@pytest.mark.parametrize("layout", ["tiny_gemma3_folder", "tiny_llama_folder"])
def test_what_was_trained_is_what_is_published(
    case: tuple, layout: str, files: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cfg = settings(request.getfixturevalue(layout), files, tmp_path)
    cfg.storage.kind, cfg.adapter.kind, cfg.adapter.rounding = case
    pipeline.run(cfg)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, load_schema())
    gates = {gate["name"]: gate for gate in report["guard"]["gates"]}
    assert report["guard"]["passed"]
    assert gates["identity"]["value"] == 0
    assert gates["self_kld"]["value"] == 0
    assert gates["before_after_kld_mean"]["value"] == 0
    assert gates["effect_changed"]["value"] > 0
    for text in ("task", "general"):
        perplexity = report["perplexity"][text]
        assert perplexity["merged"] == perplexity["trained"] != perplexity["base"]
    assert Path(report["export"]["path"]).is_file()
    assert report["export"]["tensor_types"]["Q4_0"] == 14
    assert not (tmp_path / ".candidate").exists()
    assert "tiny" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.llama_cpp
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("logits", list(Precision))
def test_in_fp32_every_product_of_the_student_is_in_fp32(
    logits: Precision,
    held: bool,
    tiny_gemma3_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = set()

    def recorded(x: torch.Tensor) -> torch.dtype:
        seen.add(compute_dtype(x))
        return compute_dtype(x)

    monkeypatch.setattr("qatlora.adapters.layer.compute_dtype", recorded)
    cfg = settings(tiny_gemma3_folder, files, tmp_path)
    cfg.storage.kind, cfg.adapter.kind = Storage.q4_0, AdapterKind.both
    cfg.train.precision, cfg.evaluate.logits_precision = Precision.fp32, logits
    cfg.evaluate.hold_weights = held
    report = pipeline.run(cfg)
    assert seen == {torch.float32}
    assert report.guard is not None
    gates = {gate.name: gate for gate in report.guard.gates}
    assert gates["identity"].value == 0
    assert gates["self_kld"].value == 0
    assert gates["before_after_kld_mean"].value == 0


@pytest.mark.llama_cpp
def test_a_saved_adapter_is_exported_again_and_refused_on_another_base(
    tiny_gemma3_folder: Path, tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = settings(tiny_gemma3_folder, files, tmp_path / "first")
    first = pipeline.run(cfg)
    again = settings(tiny_gemma3_folder, files, tmp_path / "again")
    again.stages = [name for name in STAGES if name not in ("train", "save_adapter")]
    again.stages.insert(again.stages.index("report"), "save_base")
    again.adapter.path = str(tmp_path / "first" / "adapter")
    second = pipeline.run(again)
    assert second.checkpoint is not None
    assert second.checkpoint.on_grid_share == 1
    assert first.export is not None
    assert second.export is not None
    assert second.texts["task"]["merged"] == first.texts["task"]["merged"]

    other = settings(tiny_llama_folder, files, tmp_path / "other")
    other.stages, other.adapter.path = again.stages, again.adapter.path
    with pytest.raises(AdapterError) as refused:
        pipeline.run(other)
    assert first.base.digest in str(refused.value)
    assert str(refused.value).count("digest") == 2


@pytest.mark.llama_cpp
def test_a_merge_that_does_nothing_publishes_nothing(
    tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = settings(tiny_gemma3_folder, files, tmp_path)
    cfg.train.learning_rate, cfg.guard.require_effect = 1e-12, True
    with pytest.raises(GuardFailed, match="effect_changed: 0 levels and steps"):
        pipeline.run(cfg)
    assert not list(tmp_path.glob("*.gguf"))
    assert json.loads((tmp_path / "report.json").read_text())["guard"]["passed"] is False


@pytest.mark.llama_cpp
def test_training_without_a_teacher_skips_the_drift_gate(
    tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = settings(tiny_gemma3_folder, files, tmp_path)
    cfg.teacher.kind, cfg.teacher.kl_weight, cfg.teacher.general_kl_weight = TeacherKind.none, 0, 0
    report = pipeline.run(cfg)
    assert report.guard is not None
    assert {gate.name: gate.status for gate in report.guard.gates}["drift"] == "skipped"
    assert report.texts["task"]["merged"].kld is None
