"""What a tracker is, and which one the settings ask for."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from qatlora.config import LoggingConfig, ReportTo
from qatlora.errors import ConfigError
from qatlora.report.results import RunReport, TrainPoint
from qatlora.report.results_curve import CurvePoint

_PACKAGES = {ReportTo.wandb: "wandb", ReportTo.tensorboard: "tensorboard"}


class Tracker(Protocol):
    """Takes the figures of one run as they come."""

    def log(self, point: TrainPoint | CurvePoint) -> None:
        """Take one line of a log of training."""

    def report(self, report: RunReport, written: Sequence[Path]) -> None:
        """Take the report's tables and its files: report.json, report.md and the plots."""

    def close(self, *, failed: bool) -> None:
        """End the run; what was logged before stays."""


class NoTracker:
    """Takes everything and does nothing."""

    def log(self, point: TrainPoint | CurvePoint) -> None:
        """Do nothing."""

    def report(self, report: RunReport, written: Sequence[Path]) -> None:
        """Do nothing."""

    def close(self, *, failed: bool) -> None:
        """Do nothing."""


def require_tracker(settings: LoggingConfig) -> None:
    """Find the package of the chosen tracker, before any long work.

    Raises:
        ConfigError: it is not installed.
    """
    package = _PACKAGES.get(settings.report_to)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"logging.report_to={settings.report_to.name} needs the package {package}, which is "
            f"not installed. Add it with: pip install {package}, or use logging=none."
        )


def open_tracker(
    settings: LoggingConfig, run_dir: Path, config: dict[str, Any], last_step: int
) -> Tracker:
    """Begin to follow a run, or go on where it is resumed.

    Args:
        settings: which tracker.
        run_dir: the run's folder; trackers keep their files in it.
        config: the run's settings, JSON values only.
        last_step: of the checkpoint that training goes on from, 0 where it begins; an earlier start
            may have logged later steps, which are trained again.
    """
    if settings.report_to is ReportTo.wandb:
        from qatlora.tracking.wandb_run import WandbTracker

        return WandbTracker(settings.project, run_dir, config, resumed=last_step > 0)
    if settings.report_to is ReportTo.tensorboard:
        from qatlora.tracking.tensorboard_run import TensorBoardTracker

        return TensorBoardTracker(run_dir, last_step)
    return NoTracker()
