"""SIGINT and SIGTERM: what a run does when it is asked to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import NoReturn

from qatlora.errors import Interrupted

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def handled(numbers: Collection[signal.Signals], handler: Handler) -> Iterator[None]:
    """Let `handler` receive these signals; the handlers before it are put back in the end.

    Python delivers signals to the main thread alone: in another one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interrupt(number: int, frame: FrameType | None = None) -> NoReturn:
    """End the run where it stands.

    Raises:
        Interrupted: always.
    """
    raise Interrupted(
        f"Ended by {signal.Signals(number).name}; what was written before stays in the run folder, "
        "and the same command with run_dir=THAT_FOLDER starts again there. Training goes on from "
        "its last checkpoint with train.resume=true; a teacher cache is added to without it.",
        number,
    )
