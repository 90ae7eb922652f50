"""What the data room hands on: token rows, held-out texts and the batches of a whole run."""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

IGNORED = -100
"""Label of a token that is neither trained nor scored (as in torch and transformers)."""

Source = Literal["chat", "general"]


@dataclass(frozen=True)
class Row:
    """A sequence of tokens, or several that do not see each other.

    Attributes:
        input_ids: token ids, unpadded.
        labels: as long as `input_ids`; `labels[i]` is the token AT position i, or `IGNORED`. The
            shift by one position happens in the loss.
        source: "chat" (loss on the assistant's tokens) or "general" (loss on every token).
        starts: where each sequence begins; positions count from there.
    """

    input_ids: list[int]
    labels: list[int]
    source: Source
    starts: tuple[int, ...] = (0,)

    @property
    def num_scored_tokens(self) -> int:
        """Labels that a causal model can be scored on: position 0 has nothing before it."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def key(self) -> bytes:
        """Digest of tokens, labels and starts, 16 bytes: what a teacher cache finds a row by."""
        digest = hashlib.blake2b(digest_size=16)
        for numbers in (self.input_ids, self.labels, self.starts):
            digest.update(array("i", numbers).tobytes())
        return digest.digest()


def text_key(rows: Iterable[Row]) -> str:
    """Hex digest of a text: its rows in order."""
    keys = b"".join(row.key for row in rows)
    return hashlib.blake2b(keys, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Text:
    """A text for evaluation: the held-out task, validation and general, or one of its own name."""

    name: str
    rows: list[Row]


def first_rows(rows: Iterable[Row], num_tokens: int) -> list[Row]:
    """The first rows with at most `num_tokens` scored tokens together, at least one row."""
    taken: list[Row] = []
    total = 0
    for row in rows:
        total += row.num_scored_tokens
        if taken and total > num_tokens:
            break
        taken.append(row)
    return taken


@dataclass(frozen=True)
class Batches:
    """The data of a run.

    Attributes:
        train: `max_steps * rows_per_step` rows in the order of training; every consecutive group
            of `rows_per_step` holds the same number of general rows. They must not be reshuffled.
        texts: the held-out texts, "task" first.
        prompts: conversations that end with a user turn and do not occur in `train`.
        notes: counts, shares, licences and sources for the report; JSON values only.
    """

    train: list[Row]
    texts: list[Text]
    prompts: list[list[dict[str, Any]]]
    notes: dict[str, Any]
