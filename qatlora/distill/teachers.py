"""Where a teacher's word probabilities come from while a loss is computed.

The loss asks for them chunk by chunk (`load`) and then for a few rows at a time (`log_probs`), so
that a teacher held as hidden states never has more than one chunk of logits in memory, and one
read from disk can fetch the same chunk. Shapes: T tokens of a call, C of a chunk, V words.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qatlora.distill.head import LmHead


class TeacherReader(Protocol):
    """Serves one call of the loss."""

    def load(self, tokens: Tensor) -> None:
        """Make the chunk of these tokens current; [C] int64 indices into the call's T tokens."""

    def log_probs(self, rows: slice, temperature: float, student: Tensor) -> Tensor:
        """Return log-probabilities [n, V] of rows of the current chunk.

        Args:
            rows: positions within the current chunk.
            temperature: of the softmax.
            student: [n, V] the student's log-probabilities at that temperature; a teacher that
                knows only its top words spreads the rest in proportion to them, which makes the
                KL that of a single bucket. Not to be changed.

        Returns:
            Finite, normalized, in the dtype of `student`; the caller overwrites it.
        """


class Teacher(Protocol):
    """Gives the probabilities of the T tokens of one call of the loss."""

    @property
    def vocab_size(self) -> int:
        """V."""

    def reader(self, chunk_tokens: int, compute_dtype: torch.dtype) -> TeacherReader:
        """Start a pass; at most `chunk_tokens` tokens will be loaded at a time."""


@dataclass(frozen=True)
class TeacherStates:
    """A teacher in memory: its final hidden states for the tokens of a call, and its head.

    Attributes:
        hidden: [T, H'], any float dtype; H' may differ from the student's width.
        head: the teacher's head.
    """

    hidden: Tensor
    head: LmHead

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.head.vocab_size

    def reader(self, chunk_tokens: int, compute_dtype: torch.dtype) -> TeacherReader:
        """Start a pass over these states."""
        return _StatesReader(self, chunk_tokens, compute_dtype)


class _StatesReader:
    """Holds one chunk of a teacher's raw logits, in the compute dtype."""

    def __init__(self, states: TeacherStates, chunk_tokens: int, compute_dtype: torch.dtype):
        self._hidden = states.hidden
        self._head = states.head.to(compute_dtype)
        self._buffer = self._head.weight.new_empty(chunk_tokens, states.vocab_size)

    def load(self, tokens: Tensor) -> None:
        hidden = self._hidden[tokens].to(self._buffer.dtype)
        torch.mm(hidden, self._head.weight.t(), out=self._buffer[: len(tokens)])

    def log_probs(self, rows: slice, temperature: float, student: Tensor) -> Tensor:
        logits = self._head.finish_(self._buffer[rows].to(student.dtype, copy=True))
        if temperature != 1:
            logits.div_(temperature)
        return torch.log_softmax(logits, dim=1)
