"""TensorBoard event files of a run."""

import importlib.util
from pathlib import Path

import pytest
from pipeline_cases import STAGES, settings, write_data

from qatlora import pipeline
from qatlora.config import LoggingConfig, ReportTo
from qatlora.errors import ConfigError
from qatlora.tracking import require_tracker

INSTALLED = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the package tensorboard")
def test_losses_tables_and_plots_are_in_the_event_file(
    tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = settings(tiny_gemma3_folder, write_data(tmp_path), tmp_path / "run")
    cfg.stages = [*STAGES[: STAGES.index("train") + 1], "evaluate_trained", "report"]
    cfg.logging.report_to = ReportTo.tensorboard
    report = pipeline.run(cfg)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert report.train is not None
    assert losses == pytest.approx([point.loss for point in report.train.history], rel=1e-6)
    assert "loss" in events.Tags()["images"]
    assert "scores/text_summary" in events.Tags()["tensors"]


@pytest.mark.skipif(INSTALLED, reason="needs an environment without tensorboard")
def test_its_absence_is_found_before_any_long_work() -> None:
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        require_tracker(LoggingConfig(report_to=ReportTo.tensorboard))
