"""Where the teacher's probabilities of a micro-batch come from: a model that runs, or a cache."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from qatlora.distill import LmHead, Teacher, TeacherCache, TeacherStates, TopWords
from qatlora.distill.losses import IGNORED_LABEL
from qatlora.evaluate import final_hidden_states

_CONTEXT = ("input_ids", "attention_mask", "position_ids")


def context_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a micro-batch that a model reads."""
    return {name: batch[name] for name in _CONTEXT if name in batch}


class BatchTeacher(Protocol):
    """Gives the teacher's probabilities for a micro-batch of the trainer."""

    def __call__(self, batch: Mapping[str, Tensor], wanted: Tensor) -> Teacher:
        """Probabilities of what follows positions 0 .. L - 2 of each row.

        Args:
            batch: what `RowCollator` makes: input_ids and labels [N, L], attention_mask or
                position_ids, keys [N, 16].
            wanted: bool [N * (L - 1)], the tokens that will be asked for.

        Returns:
            A teacher of N * (L - 1) tokens, row by row.
        """


@dataclass(frozen=True)
class RunningTeacher:
    """A model in memory: another one, or the student's own within a context.

    Attributes:
        model: a causal LM.
        within: makes the context in which the model is the teacher.
    """

    model: nn.Module
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(self, batch: Mapping[str, Tensor], wanted: Tensor) -> TeacherStates:
        """Run the model on the micro-batch."""
        with torch.no_grad(), self.within():
            hidden = final_hidden_states(self.model, **context_of(batch))
        return TeacherStates(hidden[:, :-1].flatten(0, 1), LmHead.of(self.model))


@dataclass(frozen=True)
class CachedTeacher:
    """Rows of a cache on disk; it has the scored tokens of a row, and only those are asked for."""

    cache: TeacherCache

    def __call__(self, batch: Mapping[str, Tensor], wanted: Tensor) -> TopWords:
        """Read the rows of which tokens are wanted.

        Raises:
            CacheError: one of them is not in the cache.
        """
        scored = (batch["labels"][:, 1:] != IGNORED_LABEL).cpu()
        is_read = wanted.view_as(scored).any(dim=1).cpu()
        rows = [self.cache.row(bytes(key)) for key in batch["keys"][is_read].tolist()]
        return _spread(rows, (scored & is_read.unsqueeze(1)).flatten())


def _spread(rows: list[TopWords], scored: Tensor) -> TopWords:
    """Put the tokens [n] of all rows at their places among all tokens [T]."""
    first = rows[0]

    def placed(parts: list[Tensor]) -> Tensor:
        found = torch.cat(parts)
        every = found.new_zeros(len(scored), *found.shape[1:])
        every[scored] = found
        return every

    return TopWords(
        placed([row.words for row in rows]),
        placed([row.log_probs for row in rows]),
        placed([row.rest for row in rows]),
        first.vocab_size,
        first.temperature,
    )
