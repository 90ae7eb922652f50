"""A model on a text, window batch by window batch, so that memory does not grow with the text."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qatlora.distill import LmHead
from qatlora.errors import DataError
from qatlora.evaluate.scores import ScoreSettings, TokenScores, score_tokens
from qatlora.evaluate.states import ReferenceStates, Row, StatesBatch, scored_states


def evaluate_text(
    model: nn.Module,
    head: LmHead,
    rows: Sequence[Row],
    reference: ReferenceStates | None = None,
    settings: ScoreSettings | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> TokenScores:
    """Score every labelled token of the rows; reduce the result with `summarize`.

    Args:
        model: Hugging Face causal LM (see `final_hidden_states`).
        head: its head, `LmHead.of(model)`.
        rows: windows of text.
        reference: states of another model on the same rows with the same settings; None for
            perplexity alone.
        settings: batch and tile sizes, precision.
        on_tokens: called after each batch with its number of scored tokens.

    Raises:
        DataError: no token to score, or the reference was run on other tokens.
    """
    settings = settings or ScoreSettings()
    parts, done = [], 0
    for batch in scored_states(model, rows, settings):
        stop = done + len(batch.targets)
        hidden, targets = batch.hidden, batch.targets
        if reference is None:
            parts.append(score_tokens(hidden, head, targets, settings=settings))
        else:
            _check_same_tokens(batch, reference, done)
            states = reference.hidden[done:stop]
            parts.append(score_tokens(hidden, head, targets, states, reference.head, settings))
        done = stop
        if on_tokens is not None:
            on_tokens(len(batch.targets))
    if reference is not None and done != len(reference.targets):
        raise _other_tokens(done, len(reference.targets))
    return TokenScores.concatenate(parts)


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
