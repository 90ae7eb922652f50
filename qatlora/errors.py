"""Errors that a person can act on: one base class, one subclass per cause.

Every message names the value found, the rule it breaks and the remedy, in one paragraph.
`__main__` prints it without a traceback and exits with the class's `exit_code`;
`QATLORA_TRACEBACK=1` shows the traceback as well.
"""

import difflib
from collections.abc import Iterable


class QatloraError(Exception):
    """Base of all errors that qatlora raises on purpose."""

    exit_code = 1


class ConfigError(QatloraError):
    """A setting is unknown, missing or contradicts another one."""

    exit_code = 2


class CheckpointError(QatloraError):
    """A base checkpoint is missing, broken, or of a kind that cannot be used."""


class GridError(QatloraError):
    """A tensor cannot be expressed as Q4_0 blocks."""


class AdapterError(QatloraError):
    """An adapter does not fit its base, its settings or its identity file."""


class DataError(QatloraError):
    """Training or evaluation data is malformed; the message names file and line."""


class ResourceError(QatloraError):
    """Memory, disk or time would not suffice; found by the preflight."""


class ToolError(QatloraError):
    """A registry package or a tool of llama.cpp is missing or failed."""


class ExportError(QatloraError):
    """Writing or reading back a candidate failed."""


class GuardFailed(QatloraError):
    """A gate stopped the export; nothing was published."""

    exit_code = 3


class SweepFailed(QatloraError):
    """A run of a sweep failed; the others took place, and the table names the reason."""


class TrainError(QatloraError):
    """Training cannot go on: the loss is not finite, or a checkpoint does not fit."""


class RunFolderError(QatloraError):
    """A run folder or teacher cache is in use, or the folder holds another run."""


class CacheError(QatloraError):
    """A teacher cache is missing, damaged, or was made for another run."""


class BenchmarkError(QatloraError):
    """A method could not be measured."""


class FidelityError(QatloraError):
    """Models cannot be compared, or their figures are not repeatable."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and did; no failure, so that a sweep stops with it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number
        """What a shell reports of a process that signal `number` ended."""


def first_line(problem: BaseException) -> str:
    """What another library's exception says, for a message of ours; else its class."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def closest(word: str, choices: Iterable[str]) -> str:
    """Sentence part that lists `choices` and, where one is near `word`, proposes it."""
    choices = sorted(choices)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    proposal = f"; did you mean {near[0]}?" if near else "."
    return f"the choices are {', '.join(choices)}{proposal}"
