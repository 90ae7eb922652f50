"""Rows of conversations in the order of training, and what was met on the way."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from qatlora.data.encode import ChatEncoder, Encoded
from qatlora.data.packing import packed
from qatlora.data.rows import Row, first_rows
from qatlora.data.sources import ChatMixture
from qatlora.errors import DataError

_CONVERSATIONS_PER_BATCH = 32


@dataclass
class ChatCourse:
    """Turns conversations into rows, as many as are asked for, and counts.

    Attributes:
        chats: the conversations.
        encoder: renders and encodes them.
        split_long: whether a long conversation becomes several rows (see `ChatEncoder.split`) or is
            cut off.
        packing: whether a training row holds as many conversations as fit.
        user_turns: contents of all user turns met.
        dropped: reason -> conversations (or windows of them) that gave no row.
        num_used: conversations read.
        num_epochs: times the conversations were gone through, the last perhaps in part; of several
            sets the one that was gone through most.
        num_cut: conversations that did not fit into their row.
        num_cut_tokens: tokens that did not fit into their row.
    """

    chats: ChatMixture
    encoder: ChatEncoder
    split_long: bool
    packing: bool = False
    user_turns: set[str] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    num_used: int = 0
    num_epochs: int = 0
    num_cut: int = 0
    num_cut_tokens: int = 0

    def training_rows(self, indices: Sequence[int], num_rows: int, seed: int) -> list[Row]:
        """`num_rows` rows of the conversations `indices`, in a new order in every epoch.

        Raises:
            DataError: none of the conversations can be used.
        """
        rng = random.Random(f"{seed} chats")
        ready = self.encoded(rng.sample(indices, len(indices)))
        if self.packing:
            ready = packed(ready, self.encoder.max_length)
        epoch = list(islice(ready, num_rows))
        if num_rows and not epoch:
            raise self.nothing_left("training")
        rows: list[Row] = []
        num_epochs = 0
        while len(rows) < num_rows:
            # Neighbours are windows of one conversation: a step should see several conversations.
            rng.shuffle(epoch)
            rows += epoch[: num_rows - len(rows)]
            num_epochs += 1
        self.num_epochs = max(self.num_epochs, num_epochs)
        return rows

    def held_out_rows(self, indices: Sequence[int], num_tokens: int) -> list[Row]:
        """Rows with at most `num_tokens` scored tokens (at least one row), the same for every seed.

        Raises:
            DataError: none of the conversations can be used.
        """
        candidates = list(self.encoded(indices))
        random.Random("held out").shuffle(candidates)
        rows = first_rows(candidates, num_tokens)
        if not rows:
            raise self.nothing_left("held-out")
        return rows

    def encoded(self, indices: Sequence[int]) -> Iterator[Row]:
        """Rows of the conversations in the order of `indices`, read when they are needed."""
        return (outcome.row for outcome in self.outcomes(indices) if outcome.row is not None)

    def outcomes(self, indices: Sequence[int]) -> Iterator[Encoded]:
        """What becomes of the conversations (or windows of them), a row or a reason."""
        for first in range(0, len(indices), _CONVERSATIONS_PER_BATCH):
            batch = [self.chats[i] for i in indices[first : first + _CONVERSATIONS_PER_BATCH]]
            self.num_used += len(batch)
            self.user_turns.update(
                message["content"]
                for each in batch
                for message in each
                if message["role"] == "user"
            )
            windows = self.encoder.split(batch) if self.split_long else batch
            for encoded in self.encoder.encode(windows):
                self.num_cut += encoded.num_cut_tokens > 0
                self.num_cut_tokens += encoded.num_cut_tokens
                if encoded.row is None:
                    self.dropped[str(encoded.dropped)] += 1
                yield encoded

    def nothing_left(self, part: str, length: str = "data.max_length_tokens") -> DataError:
        """The error that no conversation of the part `part` gave a row; `length` is the setting."""
        reasons = "; ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
        return DataError(
            f"No {part} conversation of {self.chats.name} can be used ({reasons}). Raise "
            f"{length} (it is {self.encoder.max_length}), or shorten what stands "
            "before the first answer."
        )
