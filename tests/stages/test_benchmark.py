"""The recipe benchmark from preflight to report on a tiny model, and its resumption."""

import json
import signal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from sample_text import sentences

from qatlora import pipeline
from qatlora.benchmark import trial
from qatlora.config import BenchmarkMethod, BenchmarkSuite, RootConfig
from qatlora.errors import ConfigError, Interrupted
from qatlora.report.json_report import load_schema
from qatlora.train.interruption import Interruption


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A domain and a general text, each of paragraphs that differ."""
    folder = tmp_path_factory.mktemp("texts")
    paths = {}
    for seed, name in enumerate(("domain", "general")):
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text("\n\n".join(sentences(400, seed)), encoding="utf-8")
    return paths


def settings(base: Path, texts: dict[str, Path], run_dir: Path, suite: str) -> RootConfig:
    cfg = RootConfig(stages=["preflight", "benchmark", "report"], run_dir=str(run_dir))
    cfg.card.name = "benchmark"
    cfg.base.path, cfg.base.name = str(base), "tiny"
    cfg.adapter.rank = 4
    cfg.data.general, cfg.data.max_length_tokens = str(texts["general"]), 32
    cfg.logging.progress_bars = False
    cfg.train.device = "cpu"
    bench = cfg.benchmark
    bench.suite = BenchmarkSuite[suite]
    bench.domain, bench.eval_tokens = str(texts["domain"]), 128
    bench.max_steps, bench.learning_rates, bench.seeds = 2, [1e-2], [0, 1]
    bench.tokens_per_step, bench.rounds, bench.warmup_rounds = [64], 1, 0
    return cfg


def report_of(run_dir: Path) -> dict:
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, load_schema())
    return report


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_the_suite_adapters_reports_shares_and_resumes_trial_by_trial(
    tiny_llama_folder: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = settings(tiny_llama_folder, texts, tmp_path, "adapters")
    cfg.benchmark.methods = [
        BenchmarkMethod.steps_q4_0, BenchmarkMethod.peft_bf16, BenchmarkMethod.reference_q4_0,
    ]  # fmt: skip
    pipeline.run(cfg)
    first = report_of(tmp_path)["benchmark"]["adapters"]
    assert [s["method"] for s in first["summaries"]] == [
        "peft_bf16", "reference_q4_0", "steps_q4_0",
    ]  # fmt: skip
    assert first["rounded_by"] == "search"
    assert len(first["runs"]) == 6
    bound, reference, steps = first["summaries"]
    assert bound["share"]["median"] == 1
    assert bound["merged_share"] is not None
    assert steps["codes_changed"]["median"] == 0 < steps["steps_changed"]["median"]
    assert reference["codes_changed"]["median"] > 0
    assert first["skipped"] == []
    assert (tmp_path / "forgetting.png").is_file()
    assert "plain LoRA beside" in (tmp_path / "report.md").read_text(encoding="utf-8")

    killed = next((tmp_path / "runs").glob("steps_q4_0*"))
    killed.unlink()
    ran = []
    original = pipeline.STAGES["benchmark"].__globals__["run_trial"]

    def counted(trial, *rest):
        ran.append(trial)
        return original(trial, *rest)

    monkeypatch.setattr("qatlora.stages.benchmark.run_trial", counted)
    pipeline.run(cfg)
    assert [trial.method for trial in ran] == [BenchmarkMethod.steps_q4_0]
    again = report_of(tmp_path)["benchmark"]["adapters"]
    timeless = [{k: v for k, v in run.items() if k != "seconds"} for run in again["runs"]]
    assert timeless == [{k: v for k, v in run.items() if k != "seconds"} for run in first["runs"]]


def test_a_signal_stops_the_suite_and_finished_trials_stay(
    tiny_llama_folder: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = settings(tiny_llama_folder, texts, tmp_path, "adapters")
    cfg.benchmark.methods = [BenchmarkMethod.steps_q4_0]
    build, trials = trial.build, []

    def build_and_terminate(*args: Any) -> Any:
        trials.append(args)
        if len(trials) == 2:
            monkeypatch.setattr(Interruption, "on_step_begin", terminate, raising=False)
        return build(*args)

    monkeypatch.setattr(trial, "build", build_and_terminate)
    with pytest.raises(Interrupted, match="Ended by SIGTERM; what was written before") as ended:
        pipeline.run(cfg)
    assert "qatlora-trial" not in str(ended.value)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def terminate(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


def test_without_llama_cpps_tools_the_merge_is_skipped_with_a_line(
    tiny_llama_folder: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QATLORA_LLAMA_CPP_BIN", str(tmp_path / "nowhere"))
    cfg = settings(tiny_llama_folder, texts, tmp_path, "adapters")
    cfg.benchmark.methods = [BenchmarkMethod.peft_nf4]
    cfg.benchmark.seeds = [0]
    pipeline.run(cfg)
    result = report_of(tmp_path)["benchmark"]["adapters"]
    assert "llama-quantize" in result["skipped"][0]
    assert result["runs"][0]["deployed"] is None
    assert "llama-quantize is not there" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_suite_speed_reports_ratios(
    tiny_gemma3_folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    cfg = settings(tiny_gemma3_folder, texts, tmp_path, "speed")
    cfg.benchmark.methods = [BenchmarkMethod.peft_nf4, BenchmarkMethod.lora_q4_0]
    pipeline.run(cfg)
    rows = report_of(tmp_path)["benchmark"]["speed"]["rows"]
    assert [row["method"] for row in rows] == ["peft_nf4", "lora_q4_0"]
    assert rows[0]["time_ratio"] == 1
    assert (tmp_path / "speed.png").is_file()


@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_experts"], indirect=True)
def test_experts_are_refused_because_the_baselines_are_linears_alone(
    tiny_multimodal_folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"mixture of experts.*Leave the experts out.*base\.trained"
    ):
        pipeline.run(settings(tiny_multimodal_folder, texts, tmp_path, "speed"))
