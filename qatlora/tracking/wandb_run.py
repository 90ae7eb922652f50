"""A run on Weights & Biases: sent where that can be, else kept in RUN/wandb to be sent later."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import wandb

from qatlora import files, progress
from qatlora.errors import first_line
from qatlora.report.results import RunReport, TrainPoint
from qatlora.report.results_curve import CurvePoint
from qatlora.tracking.figures import (
    GATE_COLUMNS,
    SCORE_COLUMNS,
    gate_rows,
    scalars,
    score_rows,
)
from qatlora.tracking.wandb_login import why_offline

_ID = "wandb/run_id"  # in the run folder
_LONGEST_START_SECONDS = 30.0
_LONGEST_END_SECONDS = 120.0  # then what was not sent stays on the disk


class WandbTracker:
    """Never asks and never waits for long: without key or network the run is kept offline."""

    def __init__(
        self, project: str, run_dir: Path, config: dict[str, Any], *, resumed: bool
    ) -> None:
        """Begin a run, or go on with the one whose id the run folder keeps.

        A service does not take a step twice; offline each start has files of its own, and `wandb
        sync` sends those of one id in their order.
        """
        kept = run_dir / _ID
        options = {"project": project, "name": run_dir.name, "dir": str(run_dir), "config": config}
        if resumed and kept.is_file():
            options |= {"id": kept.read_text("utf-8").strip(), "resume": "allow"}
        self._run = _begin(run_dir, options)
        files.write_text(kept, f"{self._run.id}\n")

    def log(self, point: TrainPoint | CurvePoint) -> None:
        """Log the step's scalars."""
        with _said():
            self._run.log(scalars(point), step=point.step)

    def report(self, report: RunReport, written: Sequence[Path]) -> None:
        """Log the tables of KLD and gates, the plots, and all files as one artifact."""
        tables = {
            "scores": wandb.Table(columns=list(SCORE_COLUMNS), data=score_rows(report)),
            "gates": wandb.Table(columns=list(GATE_COLUMNS), data=gate_rows(report)),
        }
        plots = {path.stem: wandb.Image(str(path)) for path in written if path.suffix == ".png"}
        artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
        for path in written:
            artifact.add_file(str(path))
        with _said():
            self._run.log(tables | plots)
            self._run.log_artifact(artifact)

    def close(self, *, failed: bool) -> None:
        """End the run, waiting for what is being sent no longer than two minutes."""
        with _said():
            self._run.finish(exit_code=int(failed))


def _begin(run_dir: Path, options: dict[str, Any]) -> wandb.Run:
    """On the service where it answers, else on the disk."""
    reason = why_offline()
    if reason is None:
        try:
            return wandb.init(mode="online", settings=_settings(), **options)
        except wandb.Error as problem:
            reason = first_line(problem)
    mode = "disabled" if os.environ.get("WANDB_MODE") == "disabled" else "offline"
    progress.say(
        f"wandb: {mode} ({reason}); `wandb sync {run_dir}/wandb/offline-run-*` sends it later."
    )
    return wandb.init(mode=mode, settings=_settings(), **options)


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """What wandb cannot do is said, and the run goes on."""
    try:
        yield
    except (wandb.Error, OSError) as problem:
        progress.say(f"wandb: {problem}; the run goes on without it.")


def _settings() -> wandb.Settings:
    return wandb.Settings(
        console="off",  # progress bars are no log
        silent=True,
        init_timeout=_LONGEST_START_SECONDS,
        finish_timeout=_LONGEST_END_SECONDS,
    )
