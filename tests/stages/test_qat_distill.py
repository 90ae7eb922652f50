"""recipe=qat_distill on tiny models: the whole path, its base used again, resume, refusals."""

import json
from pathlib import Path

import jsonschema
import pytest
from pipeline_cases import DISTILL_STAGES, distill, run_killed, settings

from qatlora import pipeline
from qatlora.config import (
    AdapterKind,
    Latent,
    LatentSteps,
    Optimizer,
    Storage,
    TeacherKind,
    Trained,
)
from qatlora.config.rules import validate
from qatlora.errors import ConfigError, GuardFailed, TrainError
from qatlora.report.json_report import load_schema


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("steps", "layout"),
    [
        ("frozen", "tiny_gemma3_folder"),
        ("recomputed", "tiny_llama_folder"),
        ("learned", "tiny_llama_folder"),
    ],
)
def test_what_was_trained_is_what_is_published_and_saved(
    steps: str, layout: str, files: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cfg = distill(request.getfixturevalue(layout), files, tmp_path, steps)
    pipeline.run(cfg)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, load_schema())
    gates = {gate["name"]: gate for gate in report["guard"]["gates"]}
    assert report["guard"]["passed"]
    assert gates["identity"]["value"] == 0
    assert gates["before_after_kld_mean"]["value"] == 0
    assert gates["effect_changed"]["value"] > 0
    assert gates["effect_kld"]["status"] == "skipped"  # a smoke run
    assert report["adapter"] is None
    assert report["latents"]["steps"] == steps
    assert report["checkpoint"]["on_grid_share"] == 1
    assert report["checkpoint"]["differing_blocks"] == 0
    for text in ("task", "general"):
        perplexity = report["perplexity"][text]
        assert perplexity["merged"] == perplexity["trained"] != perplexity["base"]
        same = perplexity["reference"] == perplexity["base"]
        assert same == (steps == "recomputed")
    assert report["history"][0]["ce"] is None
    assert report["history"][0]["general_kl"] > 0

    again = settings(tmp_path / "base", files, tmp_path / "again")
    again.stages = DISTILL_STAGES[: DISTILL_STAGES.index("evaluate_base") + 1]
    again.storage.kind, again.adapter.kind = Storage.q4_0, AdapterKind.steps
    first = pipeline.run(again)
    assert first.base.on_grid_share == 1
    assert first.texts["general"]["base"].perplexity == report["perplexity"]["general"]["merged"]


@pytest.mark.llama_cpp
def test_distilling_lowers_the_kld_and_passes_the_effect_gate(
    tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = distill(tiny_llama_folder, files, tmp_path)
    cfg.train.max_steps, cfg.train.save_steps, cfg.train.learning_rate = 40, 40, 0.035
    cfg.guard.require_effect = True
    report = pipeline.run(cfg)
    kld = {model: result.kld.mean for model, result in report.texts["general"].items()}
    assert kld["merged"] < 0.5 * min(kld["base"], kld["reference"])


@pytest.mark.llama_cpp
def test_a_distillation_that_does_nothing_leaves_nothing(
    tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = distill(tiny_llama_folder, files, tmp_path)
    cfg.train.learning_rate, cfg.guard.require_effect = 1e-12, True
    with pytest.raises(GuardFailed, match="effect_kld"):
        pipeline.run(cfg)
    assert not list(tmp_path.glob("*.gguf"))
    assert not (tmp_path / "base").exists()


@pytest.mark.llama_cpp
def test_adapters_alone_are_distilled_by_the_same_recipe(
    tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = distill(tiny_gemma3_folder, files, tmp_path)
    cfg.distill.train, cfg.adapter.kind = Trained.adapters, AdapterKind.steps
    report = pipeline.run(cfg)
    assert report.adapter is not None
    assert report.latents is None
    assert report.guard is not None
    assert report.guard.passed
    assert report.checkpoint is not None
    assert report.checkpoint.on_grid_share == 1


@pytest.mark.parametrize(
    ("steps", "latent", "optimizer"),
    [("frozen", "fp32", "adamw"), ("learned", "bf16", "adamw_8bit")],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    steps: str,
    latent: str,
    optimizer: str,
    tiny_gemma3_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = {}
    for name in ("whole", "killed"):
        runs[name] = distill(tiny_gemma3_folder, files, tmp_path / name, steps)
        runs[name].distill.latent = Latent[latent]
        runs[name].train.optimizer = Optimizer[optimizer]
        runs[name].stages = [*DISTILL_STAGES[: DISTILL_STAGES.index("train") + 1], "save_base"]
    expected = pipeline.run(runs["whole"])
    run_killed(runs["killed"], 3, monkeypatch)
    # A checkpoint that the kill cut off while it was written is passed over.
    (tmp_path / "killed" / "checkpoints" / "checkpoint-3").mkdir()
    runs["killed"].train.resume = True
    resumed = pipeline.run(runs["killed"])
    assert expected.train is not None
    assert resumed.train is not None
    losses = [point.loss for point in expected.train.history]
    assert [point.loss for point in resumed.train.history] == losses
    saved = [tmp_path / name / "base" / "qatlora.json" for name in runs]
    blocks = [json.loads(path.read_text())["blocks"] for path in saved]
    assert blocks[0] == blocks[1]


def test_a_checkpoint_of_other_parameters_is_refused(
    tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = distill(tiny_gemma3_folder, files, tmp_path)
    cfg.stages = DISTILL_STAGES[: DISTILL_STAGES.index("train") + 1]
    pipeline.run(cfg)
    cfg.train.resume, cfg.distill.steps = True, LatentSteps.learned
    with pytest.raises(ConfigError, match=r"distill\.steps=learned: the run in .* has frozen"):
        pipeline.run(cfg)
    (tmp_path / "config.json").unlink()
    with pytest.raises(TrainError, match="checkpoint of another run"):
        pipeline.run(cfg)


def test_bad_settings_are_refused_before_anything_is_loaded(
    tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    def refused(words: str, **changes: object) -> None:
        cfg = distill(tiny_gemma3_folder, files, tmp_path)
        validate(cfg)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            setattr(getattr(cfg, section), name, value)
        with pytest.raises(ConfigError, match=words):
            validate(cfg)

    refused(r"storage=q4_0.*Use storage=bf16", storage__kind=Storage.q4_0)
    refused(r"storage=nf4.*Use storage=bf16", storage__kind=Storage.nf4)
    refused("teacher=bf16", teacher__kind=TeacherKind.none)
    refused(r"replay_mix\.c4=0", data__replay_mix={"c4": 0.0})
    with_adapter = distill(tiny_gemma3_folder, files, tmp_path)
    with_adapter.stages.insert(DISTILL_STAGES.index("train") + 1, "save_adapter")
    with pytest.raises(ConfigError, match=r"distill\.train=adapters"):
        validate(with_adapter)
