"""A model on a text, window batch by window batch, so that memory does not grow with the text."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from qatlora.distill import LmHead
from qatlora.errors import DataError
from qatlora.evaluate.scores import Reference, ScoreSettings, TokenScores, score_tokens
from qatlora.evaluate.states import ReferenceStates, Row, StatesBatch, scored_states


def evaluate_text(
    model: nn.Module,
    rows: Sequence[Row],
    references: Sequence[ReferenceStates] = (),
    settings: ScoreSettings | None = None,
    on_batch: Callable[[StatesBatch], None] | None = None,
) -> list[TokenScores]:
    """Score every labelled token of the rows in one pass; reduce a result with `summarize`.

    Args:
        model: Hugging Face causal LM (see `final_hidden_states`).
        rows: windows of text.
        references: states of other models on the same rows with the same settings.
        settings: batch and tile sizes, precision.
        on_batch: called with each batch of the model's own states once it is scored.

    Returns:
        One `TokenScores` per reference; without any, a single one of perplexity alone.

    Raises:
        DataError: no token to score, or a reference was run on other tokens.
    """
    settings = settings or ScoreSettings()
    head = LmHead.of(model)
    batches, done = [], 0
    for batch in _gathered(scored_states(model, rows, settings), settings.chunk_tokens):
        stop = done + len(batch.targets)
        others = []
        for reference in references:
            _check_same_tokens(batch, reference, done)
            others.append(Reference(reference.hidden[done:stop], reference.head))
        batches.append(score_tokens(batch.hidden, head, batch.targets, others, settings))
        done = stop
        if on_batch is not None:
            on_batch(batch)
    for reference in references:
        if done != len(reference.targets):
            raise _other_tokens(done, len(reference.targets))
    return [TokenScores.concatenate(parts) for parts in zip(*batches, strict=True)]


def _gathered(batches: Iterable[StatesBatch], at_least: int) -> Iterator[StatesBatch]:
    """Join small batches: the head's weight is read once per batch, and states are small."""
    waiting: list[StatesBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(part.targets) for part in waiting) >= at_least:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: Sequence[StatesBatch]) -> StatesBatch:
    return StatesBatch(
        torch.cat([part.hidden for part in parts]), torch.cat([part.targets for part in parts])
    )


def _check_same_tokens(batch: StatesBatch, reference: ReferenceStates, start: int) -> None:
    expected = reference.targets[start : start + len(batch.targets)]
    if not torch.equal(expected, batch.targets.cpu()):
        raise _other_tokens(start + len(batch.targets), len(reference.targets))


def _other_tokens(num_scored: int, num_reference: int) -> DataError:
    return DataError(
        f"The reference's {num_reference} scored tokens are not those of the text (they part "
        f"before token {num_scored}): both models must see the same rows. Run the reference again "
        "on these rows with the same tokenizer."
    )
