"""TensorBoard event files of a run."""

import importlib.util
from pathlib import Path

import pytest
from pipeline_cases import STAGES, run_killed, settings, write_data

from qatlora import pipeline
from qatlora.config import LoggingConfig, ReportTo
from qatlora.errors import ConfigError
from qatlora.tracking import require_tracker

INSTALLED = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the package tensorboard")
def test_the_event_files_of_a_resumed_run_hold_each_step_once_and_tables_and_plots(
    tiny_gemma3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = settings(tiny_gemma3_folder, write_data(tmp_path), tmp_path / "run")
    cfg.stages = [*STAGES[: STAGES.index("train") + 1], "evaluate_trained", "report"]
    cfg.logging.report_to = ReportTo.tensorboard
    run_killed(cfg, 4, monkeypatch)  # three are logged, the checkpoint is of two
    cfg.train.resume = True
    report = pipeline.run(cfg)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert report.train is not None
    assert len(events.Scalars("train/loss")) == len(losses) == cfg.train.max_steps
    expected = {point.step: point.loss for point in report.train.history}
    assert losses == pytest.approx(expected, rel=1e-6)
    assert "loss" in events.Tags()["images"]
    assert "scores/text_summary" in events.Tags()["tensors"]


@pytest.mark.skipif(INSTALLED, reason="needs an environment without tensorboard")
def test_its_absence_is_found_before_any_long_work() -> None:
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        require_tracker(LoggingConfig(report_to=ReportTo.tensorboard))
