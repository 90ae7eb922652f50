"""Logs of a run while it trains: JSONL files that a resumed run goes on with."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from transformers import TrainerCallback

from qatlora import files
from qatlora.report.results import TrainPoint
from qatlora.report.results_curve import CurvePoint

OnStep = Callable[[int], None]
OnPoint = Callable[[TrainPoint], None]
OnEval = Callable[[int], Sequence[CurvePoint]]
"""Scores the model after a number of steps."""


class _Point(Protocol):
    @property
    def step(self) -> int:
        """Optimizer steps before it."""


P = TypeVar("P", bound=_Point)


class PointFile(Generic[P]):
    """Points in the order of their steps, in memory and as the lines of a JSONL file.

    Attributes:
        points: all of them, those of the run that is gone on with among them.
    """

    def __init__(self, path: Path, kind: Callable[..., P]) -> None:
        self.points: list[P] = []
        self._path = path
        self._kind = kind

    def begin(self, step: int) -> None:
        """Take over the lines up to the step and drop the others."""
        if self._path.is_file():
            written = self._path.read_text("utf-8").splitlines(keepends=True)
            lines = [json.loads(line) for line in written if line.endswith("\n")]  # a kill cuts one
            self.points = [self._kind(**x) for x in lines if x["step"] <= step]
            files.write_text(self._path, "".join(_line(point) for point in self.points))

    def append(self, point: P, *, write: bool = True) -> None:
        """Keep one point, and write its line."""
        self.points.append(point)
        if write:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(_line(point))


def _line(point: _Point) -> str:
    return json.dumps(vars(point)) + "\n"


class StepLog(TrainerCallback):
    """Keeps the history of losses in its file, and moves the bar."""

    def __init__(
        self, file: PointFile[TrainPoint], on_step: OnStep, on_point: OnPoint | None
    ) -> None:
        self._file = file
        self._on_step = on_step
        self._on_point = on_point
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within this is no part of a step's time."""
        start = time.monotonic()
        yield
        self._last += time.monotonic() - start

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on with the file of a resumed run."""
        self._last = time.monotonic()
        self._file.begin(state.global_step)
        if state.global_step:
            self._on_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the progress bar."""
        self._on_step(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep one step."""
        if not logs or "loss" not in logs:
            return
        now = time.monotonic()
        point = TrainPoint(
            step=state.global_step,
            loss=logs["loss"],
            ce=logs.get("ce"),
            kl=logs.get("kl"),
            general_kl=logs.get("general_kl"),
            learning_rate=logs["learning_rate"],
            seconds=now - self._last,
        )
        self._last = now
        self._file.append(point, write=state.is_world_process_zero)
        if state.is_world_process_zero and self._on_point is not None:
            self._on_point(point)


class EvalLog(TrainerCallback):
    """Keeps scores in its file: before the first step, every `every` steps, after the last."""

    def __init__(
        self, file: PointFile[CurvePoint], on_eval: OnEval, every: int, step_log: StepLog
    ) -> None:
        self._file = file
        self._on_eval = on_eval
        self._every = every
        self._step_log = step_log

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on with the file of a resumed run, or score the model as it starts."""
        self._file.begin(state.global_step)
        if not state.global_step:
            self._score(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score where it is time; before the checkpoint of this step, so that this one is kept."""
        step = state.global_step
        if step % self._every == 0 or step == state.max_steps:
            self._score(step)

    def _score(self, step: int) -> None:
        with self._step_log.paused():
            for point in self._on_eval(step):
                self._file.append(point)
