"""A sweep: what each run leaves behind for the table of all of them, and who gathers it.

A launcher may put a run into another process or on another machine, so a run's outcome is a file in
its folder. The process that was started by hand reads these files when the last run has ended.

A sweep may be sent to the folder of an earlier one, whose runs it may not be allowed to replace: so
nothing is deleted here. What was there before is told from what is new by the time of writing.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
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
    earlier: ClassVar[dict[Path, int | None]] = {}
    """When the outcomes that an earlier sweep left in the folder were written."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remember the folder, and the outcomes of an earlier sweep in it."""
        SweepFolder.current = Path(config.hydra.sweep.dir).absolute()
        SweepFolder.earlier = {
            path: _written_at_ns(path) for path in SweepFolder.current.rglob(OUTCOME)
        }


def _written_at_ns(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


@dataclass(frozen=True)
class _Outcome:
    number: int
    overrides: list[str]
    status: str = "unfinished"
    reason: str | None = _UNFINISHED
    seconds: float | None = None
    reported: bool = False  # whether it wrote the report that lies beside this file


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
    report_before = _written_at_ns(folder / _REPORT)
    outcome = _Outcome(number, overrides)
    files.write_json(folder / OUTCOME, dataclasses.asdict(outcome))
    start = time.monotonic()
    reason = run()
    outcome = dataclasses.replace(
        outcome,
        status="finished" if reason is None else "failed",
        reason=reason,
        seconds=time.monotonic() - start,
        reported=_written_at_ns(folder / _REPORT) != report_before,
    )
    files.write_json(folder / OUTCOME, dataclasses.asdict(outcome))


def gather(folder: Path, earlier: Mapping[Path, int | None]) -> SweepResult | None:
    """The runs of the sweep in `folder`, by number; None where none has begun.

    Args:
        folder: of the sweep.
        earlier: outcomes of another sweep, left out unless written again since.
    """
    found = [
        (_Outcome(**json.loads(path.read_text(encoding="utf-8"))), path.parent)
        for path in folder.rglob(OUTCOME)
        if path not in earlier or _written_at_ns(path) != earlier[path]
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
    if outcome.reported:
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
