"""A sweep: what each run leaves behind for the table of all of them, and who gathers it.

A launcher may put a run into another process or on another machine, so a run's outcome is a file in
its folder. The process that was started by hand reads these files when the last run has ended.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from qatlora import files
from qatlora.report.results_sweep import SweepFigures, SweepResult, SweepRun

OUTCOME = "outcome.json"
_REPORT = "report.json"
_UNFINISHED = "it ended without a word: killed, out of memory, or the machine went down"


class SweepFolder(Callback):
    """Hydra makes one (conf/config.yaml) and tells it where a sweep begins; `main` asks here."""

    current: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remember the folder, and clear it of the outcomes of an earlier sweep."""
        SweepFolder.current = Path(config.hydra.sweep.dir).absolute()
        for stale in SweepFolder.current.rglob(OUTCOME):
            stale.unlink()


@dataclass(frozen=True)
class _Outcome:
    number: int
    overrides: list[str]
    status: str = "unfinished"
    reason: str | None = _UNFINISHED
    seconds: float | None = None


def record_run(
    folder: Path, number: int, overrides: list[str], run: Callable[[], str | None]
) -> None:
    """Run one job of a sweep between two writings of its outcome.

    Args:
        folder: the run's own.
        number: of the job.
        overrides: KEY=VALUE of the job.
        run: does it; returns why it failed, or None.
    """
    (folder / _REPORT).unlink(missing_ok=True)  # of an earlier sweep in the same folder
    outcome = _Outcome(number, overrides)
    files.write_json(folder / OUTCOME, dataclasses.asdict(outcome))
    start = time.monotonic()
    reason = run()
    outcome = dataclasses.replace(
        outcome,
        status="finished" if reason is None else "failed",
        reason=reason,
        seconds=time.monotonic() - start,
    )
    files.write_json(folder / OUTCOME, dataclasses.asdict(outcome))


def gather(folder: Path) -> SweepResult | None:
    """The runs of the sweep in `folder`, by number; None where none has begun."""
    found = [
        (_Outcome(**json.loads(path.read_text(encoding="utf-8"))), path.parent)
        for path in folder.rglob(OUTCOME)
    ]
    found.sort(key=lambda pair: pair[0].number)
    settings = [_settings(outcome.overrides) for outcome, _ in found]
    differing = [
        key
        for key in dict.fromkeys(key for one in settings for key in one)
        if len({one.get(key) for one in settings}) > 1
    ]
    runs = [
        _run(outcome, place, {key: one.get(key, "") for key in differing})
        for (outcome, place), one in zip(found, settings, strict=True)
    ]
    return SweepResult(str(folder), differing, runs) if runs else None


def _settings(overrides: list[str]) -> dict[str, str]:
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def _run(outcome: _Outcome, place: Path, settings: dict[str, str]) -> SweepRun:
    report: dict[str, Any] = {}
    if (place / _REPORT).is_file():
        report = json.loads((place / _REPORT).read_text(encoding="utf-8"))
    gates = (report.get("guard") or {}).get("gates", [])
    statuses = [gate["status"] for gate in gates]
    return SweepRun(
        number=outcome.number,
        folder=str(place),
        settings=settings,
        status=outcome.status,
        reason=outcome.reason,
        seconds=outcome.seconds,
        base=_figures(report, ("base",)),
        final=_figures(report, ("merged", "trained")),
        gates={status: statuses.count(status) for status in dict.fromkeys(statuses)},
        failed_gates=[gate["name"] for gate in gates if gate["status"] == "failed"],
    )


def _figures(report: dict[str, Any], models: tuple[str, ...]) -> SweepFigures:
    """Of the first of `models` that the report has figures for."""

    def figure(kind: str, text: str) -> Any:
        measured = report.get(kind, {}).get(text, {})
        return next((measured[name] for name in models if measured.get(name) is not None), None)

    def kld(text: str) -> float | None:
        figures = figure("kld", text)
        return None if figures is None else figures["mean"]

    return SweepFigures(
        task_perplexity=figure("perplexity", "task"),
        task_kld_nats=kld("task"),
        general_perplexity=figure("perplexity", "general"),
        general_kld_nats=kld("general"),
    )
