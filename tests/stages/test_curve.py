"""Scores while training: at the right steps, of the right model, and no part of training."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from pipeline_cases import DISTILL_STAGES, STAGES, distill, run_killed, settings
from safetensors.torch import load_file

from qatlora import pipeline
from qatlora.config import AdapterKind, RootConfig, Storage, TeacherKind
from qatlora.data.rows import Row, Text
from qatlora.evaluate import ScoreSettings, TokenScores
from qatlora.evaluate.models import Evaluation
from qatlora.report.json_report import load_schema
from qatlora.report.results import RunReport
from qatlora.report.results_curve import CurvePoint
from qatlora.stages.curve import on_first_tokens

TEXTS = ("task", "general")


def course(cfg: RootConfig, stages: list[str], eval_steps: int) -> RootConfig:
    """Five steps with the evaluations around them, no export."""
    cfg.stages = [*stages[: stages.index("train") + 1], "evaluate_trained", "report"]
    cfg.train.max_steps, cfg.train.save_steps, cfg.train.eval_steps = 5, 5, eval_steps
    return cfg


@pytest.fixture(scope="module")
def distilled(
    tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, RunReport]:
    """eval_steps -> the same distillation with and without scores."""
    folder = tmp_path_factory.mktemp("distilled")
    return {
        every: pipeline.run(
            course(distill(tiny_gemma3_folder, files, folder / str(every)), DISTILL_STAGES, every)
        )
        for every in (0, 2)
    }


def trained_of(report: RunReport) -> dict[str, torch.Tensor]:
    folder = Path(report.settings["run_dir"]) / "checkpoints" / "checkpoint-5"
    return load_file(folder / "trainable.safetensors")


def test_scoring_changes_no_bit_of_training(distilled: dict[int, RunReport]) -> None:
    without, scored = distilled[0], distilled[2]
    assert without.train is not None
    assert scored.train is not None
    assert without.train.curve == []
    losses = [[replace(p, seconds=0) for p in run.train.history] for run in (without, scored)]
    assert losses[0] == losses[1]
    before, after = trained_of(without), trained_of(scored)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_ends_are_the_models_before_and_after(distilled: dict[int, RunReport]) -> None:
    report = distilled[2]
    assert report.train is not None
    points = report.train.curve
    assert [(p.step, p.text) for p in points] == [(n, t) for n in (0, 2, 4, 5) for t in TEXTS]
    for model, step in (("base", 0), ("trained", 5)):
        for point in (p for p in points if p.step == step):
            result = report.texts[point.text][model]
            assert result.kld is not None
            assert (point.tokens, point.perplexity) == (result.tokens, result.perplexity)
            assert (point.nll_stderr, point.kld_mean) == (result.nll_stderr, result.kld.mean)
    assert len({point.kld_mean for point in points}) == len(points)


def test_what_does_not_train_is_put_beside_it(distilled: dict[int, RunReport]) -> None:
    report = distilled[2]
    levels = {(level.model, level.text): level for level in report.curve_levels}
    assert levels.keys() == {(m, t) for m in ("teacher", "reference") for t in TEXTS}
    for text in TEXTS:
        assert levels["teacher", text].kld_mean is None
        reference = levels["reference", text]
        assert reference.perplexity == report.texts[text]["reference"].perplexity
    document = json.loads((Path(report.settings["run_dir"]) / "report.json").read_text("utf-8"))
    jsonschema.validate(document, load_schema())
    assert [point["step"] for point in document["curve"]] == [0, 0, 2, 2, 4, 4, 5, 5]


def test_a_resumed_run_keeps_the_points_before_its_checkpoint(
    distilled: dict[int, RunReport],
    tiny_gemma3_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = course(distill(tiny_gemma3_folder, files, tmp_path), DISTILL_STAGES, 2)
    cfg.train.save_steps = 3
    run_killed(cfg, 5, monkeypatch)
    log = tmp_path / "eval_log.jsonl"
    assert json.loads(log.read_text("utf-8").splitlines()[-1])["step"] == 4  # after checkpoint-3
    log.open("a").write('{"step": 5, "te')
    cfg.train.resume = True
    resumed = pipeline.run(cfg)
    assert distilled[2].train is not None
    assert resumed.train is not None
    assert resumed.train.curve == distilled[2].train.curve
    lines = [CurvePoint(**json.loads(line)) for line in log.read_text("utf-8").splitlines()]
    assert lines == resumed.train.curve


def test_a_run_begun_anew_keeps_no_line_of_the_killed_one(
    tiny_gemma3_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = course(distill(tiny_gemma3_folder, files, tmp_path), DISTILL_STAGES, 2)
    run_killed(cfg, 2, monkeypatch)  # before its first checkpoint
    assert (tmp_path / "eval_log.jsonl").is_file()
    cfg.train.eval_steps, cfg.train.resume = 0, True
    pipeline.run(cfg)
    assert not (tmp_path / "eval_log.jsonl").exists()
    assert len((tmp_path / "train_log.jsonl").read_text("utf-8").splitlines()) == 5


def test_adapters_without_a_teacher_have_a_curve_of_perplexity(
    tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    runs = {}
    for every in (0, 3):
        cfg = course(settings(tiny_llama_folder, files, tmp_path / str(every)), STAGES, every)
        cfg.storage.kind, cfg.adapter.kind = Storage.q4_0, AdapterKind.both
        cfg.teacher.kind = TeacherKind.none
        cfg.teacher.kl_weight = cfg.teacher.general_kl_weight = 0
        cfg.data.eval_tokens, cfg.train.eval_tokens = 300, 2
        runs[every] = pipeline.run(cfg)
    without, scored = runs[0], runs[3]
    assert without.train is not None
    assert scored.train is not None
    assert [p.loss for p in without.train.history] == [p.loss for p in scored.train.history]
    points = scored.train.curve
    assert [point.step for point in points] == [0, 0, 3, 3, 5, 5]
    assert {point.kld_mean for point in points} == {None}
    assert scored.curve_levels == []
    for text in TEXTS:  # the first row alone
        (tokens,) = {point.tokens for point in points if point.text == text}
        assert 2 <= tokens < scored.texts[text]["base"].tokens


def test_the_first_tokens_are_whole_rows_of_the_same_scores() -> None:
    rows = [Row([1, 2, 3, 4], [-100, 2, 3, 4], "general") for _ in range(3)]
    scores = TokenScores(nll=torch.arange(9.0), kld=torch.arange(9.0) / 10)
    texts = [Text("general", rows)]
    evaluation = Evaluation(texts, ScoreSettings(), scores={"base": {"general": scores}})
    first = on_first_tokens(evaluation, texts, 7)
    assert first.num_tokens == 6
    assert torch.equal(first.scores["base"]["general"].nll, torch.arange(6.0))
    assert first.scores["base"]["general"].top is None
    assert len(evaluation.scores["base"]["general"].nll) == 9
