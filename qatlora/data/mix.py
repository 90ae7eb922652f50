"""Rows of several parts in one sequence, in the proportion of the parts' weights."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qatlora.data.rows import Row
from qatlora.data.text import GeneralText, replay_rows


@dataclass(frozen=True)
class MixedText:
    """A text and its share in a mixture.

    Attributes:
        name: as in the settings; it seeds the order of the text's documents.
        text: the documents.
        weight: its share is weight / sum of weights.
    """

    name: str
    text: GeneralText
    weight: float


def mixed_rows(
    mix: Sequence[MixedText],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    num_rows: int,
    seed: int,
) -> list[Row]:
    """`num_rows` full windows, each text spread evenly; every prefix keeps the proportion.

    Raises:
        DataError: a text does not fill one window.
    """
    order = spread([part.weight for part in mix], num_rows)
    rows = [
        iter(
            replay_rows(
                part.text,
                tokenizer,
                max_length,
                order.count(number),
                random.Random(f"{seed} general {part.name}" if len(mix) > 1 else f"{seed} general"),
            )
        )
        for number, part in enumerate(mix)
    ]
    return [next(rows[number]) for number in order]


def spread(weights: Sequence[float], num_rows: int) -> list[int]:
    """Which part each row comes from: always the one that lags furthest behind its share."""
    total = sum(weights)
    taken = [0] * len(weights)
    order = []
    for place in range(1, num_rows + 1):
        lags = [
            weight / total * place - count for weight, count in zip(weights, taken, strict=True)
        ]
        number = lags.index(max(lags))
        taken[number] += 1
        order.append(number)
    return order
