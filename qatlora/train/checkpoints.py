"""Checkpoints of a run: RUN/checkpoints/checkpoint-STEP, whole or absent, the newest two kept."""

import shutil
from pathlib import Path

from qatlora import files
from qatlora.errors import TrainError

CHECKPOINTS = "checkpoints"
"""Folder of a run folder that holds one folder per checkpoint."""

_LAST_WRITTEN = "trainer_state.json"
_NUM_KEPT = 2


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """The run's whole checkpoints by step."""
    found = (run_dir / CHECKPOINTS).glob(f"checkpoint-*/{_LAST_WRITTEN}")
    return sorted((path.parent for path in found), key=_step)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The latest whole checkpoint; None where the run has saved none."""
    return next(reversed(whole_checkpoints(run_dir)), None)


def steps_done(run_dir: Path, *, resume: bool) -> int:
    """Steps that are not trained again: those of the last checkpoint, 0 where a run begins."""
    last = last_checkpoint(run_dir) if resume else None
    return _step(last) if last else 0


def begin(run_dir: Path, *, resume: bool) -> Path | None:
    """Remove what a killed run has not finished, and without `resume` all that it has.

    Returns:
        The checkpoint to go on from; None where there is none.

    Raises:
        TrainError: that checkpoint is damaged.
    """
    last = last_checkpoint(run_dir) if resume else None
    if last is not None and (problem := files.broken_sum(last)):
        raise TrainError(
            f"{problem}: the checkpoint is damaged. Remove {last} to go on from the one before it, "
            "or start anew in another run_dir."
        )
    for pattern in (".partial", ".checkpoint-*", *([] if last else ["checkpoint-*"])):
        for path in (run_dir / CHECKPOINTS).glob(pattern):
            shutil.rmtree(path)
    if last is None:
        for log in run_dir.glob("*_log.jsonl"):
            log.unlink()
    return last


def scratch(run_dir: Path) -> Path:
    """Where a checkpoint is written before `keep` renames it."""
    return run_dir / CHECKPOINTS / ".partial"


def keep(run_dir: Path, step: int) -> None:
    """Rename the checkpoint of `step` from the scratch to its place, and remove the oldest."""
    name = f"checkpoint-{step}"
    files.write_sums(scratch(run_dir) / name)
    files.move_folder(scratch(run_dir) / name, run_dir / CHECKPOINTS / name)
    scratch(run_dir).rmdir()
    for old in whole_checkpoints(run_dir)[:-_NUM_KEPT]:
        files.remove_folder(old)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
