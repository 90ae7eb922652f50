"""SIGINT and SIGTERM while training: finish the step, write its checkpoint, end."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from qatlora.errors import Interrupted
from qatlora.interrupts import handled, interrupt
from qatlora.processes import largest
from qatlora.train.checkpoints import last_checkpoint

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """Remembers the first signal until the step at work ends; a second one ends the run at once."""

    def __init__(self) -> None:
        self._number = 0

    @contextlib.contextmanager
    def watching(self, run_dir: Path) -> Iterator[None]:
        """Train within this.

        Raises:
            Interrupted: a signal came; the checkpoint of the last step is written.
        """
        with handled(_SIGNALS, self._receive):
            yield
        if self._number:
            raise Interrupted(
                f"{signal.Signals(self._number).name}: training stopped, and "
                f"{last_checkpoint(run_dir)} holds its last step. Go on with the same command and "
                f"train.resume=true run_dir={run_dir}.",
                self._number,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop where any process was asked to; all of them decide alike."""
        self._number = largest(self._number)
        if self._number:
            control.should_save = control.should_training_stop = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            interrupt(number)
        self._number = number
        # Not by the console: the signal may have come while that was writing.
        os.write(2, b"Stopping after this step, with a checkpoint; once more stops at once.\n")
