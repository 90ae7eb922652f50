"""Progress of long stages: a bar with rate and time left, or lines where there is no terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True, highlight=False)

Advance = Callable[[int], None]

_SECONDS_BETWEEN_LINES = 15.0


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {task.fields['unit']}/s" if speed else "")


@contextlib.contextmanager
def stage(name: str, total: int, unit: str, *, bars: bool = True) -> Iterator[Advance]:
    """Show the progress of one stage; yields a function that takes the units just done.

    Args:
        name: what is being done, for people.
        total: units in all.
        unit: what is counted, in the plural.
        bars: False keeps silent.
    """
    if not bars:
        yield lambda done: None
    elif console.is_terminal:
        with _bar(name, total, unit) as advance:
            yield advance
    else:
        with _lines(name, total, unit) as advance:
            yield advance


@contextlib.contextmanager
def _bar(name: str, total: int, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, unit=unit)
        yield lambda done: progress.advance(task, done)


@contextlib.contextmanager
def _lines(name: str, total: int, unit: str) -> Iterator[Advance]:
    """A line at the start of a stage, one now and then, and one at its end: fit for a log file."""
    start = last = time.monotonic()
    done_in_all = 0

    def advance(done: int) -> None:
        nonlocal done_in_all, last
        done_in_all += done
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and done_in_all < total:
            last = now
            rate = done_in_all / (now - start)
            left = (total - done_in_all) / rate
            say(f"{name}: {done_in_all}/{total} {unit}, {rate:.3g}/s, {left:.0f} s left")

    yield advance
    say(f"{name}: {done_in_all} {unit} in {time.monotonic() - start:.1f} s")


def say(message: str) -> None:
    """One line for the person who runs this, on stderr."""
    console.print(message, soft_wrap=True, markup=False)
    sys.stderr.flush()
