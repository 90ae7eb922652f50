"""Conversations to token rows: which tokens are the assistant's, and what fits into a row.

A conversation goes through `apply_chat_template` whole; transformers says which tokens lie between
the template's generation markers. A row that is too long ends after the last assistant turn that
fits. Two further rules keep training equal to what llama.cpp will do with the same words:

- BOS stands at the start exactly once if the tokenizer sets one (Gemma 3 270M without it:
  perplexity 128 instead of 25), whether the template writes it or the runtime adds it;
- a message that spells a control token ("<end_of_turn>") would end its turn and forge the next
  one, so such a conversation is left out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from qatlora.data.messages import Conversation, strings_in, tools_of
from qatlora.data.rows import IGNORED, Row
from qatlora.errors import DataError

CONTROL_TOKEN = "a message spells a control token of the chat template"
NO_ANSWER_FITS = "the first answer begins after max_length_tokens"

_EXCHANGE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
_MIN_WINDOW_SHARE = 0.5


def expected_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id if the tokenizer puts one before plain text, else None.

    Found by encoding a letter: `add_bos_token` is False for Gemma 3 in transformers 5.23, although
    its post-processor adds BOS.
    """
    ids = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids[:1] == [bos] else None


@dataclass(frozen=True)
class Encoded:
    """What became of a conversation.

    Attributes:
        row: None if the conversation had to be left out.
        dropped: the reason, if so.
        num_cut_tokens: tokens that did not fit into the row.
        num_tokens: up to the end of the last answer, uncut; 0 where nothing was rendered.
    """

    row: Row | None
    dropped: str | None = None
    num_cut_tokens: int = 0
    num_tokens: int = 0


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes conversations for one tokenizer.

    Attributes:
        tokenizer: a fast one (the mask needs its character offsets).
        template: chat template with generation markers.
        max_length: tokens of a row at most, BOS included.
        system_prompt: put before conversations that have no system message.
        options: what else the template is told, such as enable_thinking.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_length: int
    system_prompt: str | None = None
    options: Mapping[str, bool] = field(default_factory=dict)

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """A row per conversation, or the reason why there is none.

        Raises:
            DataError: the template writes BOS twice.
        """
        forged = [self.spells_control_token(each) for each in conversations]
        tokens = iter(
            self._tokens([each for each, bad in zip(conversations, forged, strict=True) if not bad])
        )
        return [
            Encoded(None, CONTROL_TOKEN) if bad else self._fitted(*next(tokens)) for bad in forged
        ]

    def split(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Cut long conversations into windows that fill a row and begin with a user turn.

        A window forgets what was said before it, so this is for talk without a task. A window that
        would fill less than half a row is left out. A conversation that fits stays whole.
        """
        windows: list[Conversation] = []
        for conversation, (ids, mask) in zip(
            conversations, self._tokens(conversations), strict=True
        ):
            fits = len(ids) <= self.max_length
            windows += [conversation] if fits else self._windows(conversation, _answer_ends(mask))
        return windows

    def with_system_prompt(self, conversation: Conversation) -> Conversation:
        """The conversation with the system prompt in front, if it has no system message."""
        if self.system_prompt is None or conversation[0]["role"] == "system":
            return conversation
        system = {"role": "system", "content": self.system_prompt}
        tools = tools_of(conversation)  # they belong to the first message
        return [system | ({"tools": tools} if tools else {}), *conversation]

    def spells_control_token(self, conversation: Conversation) -> bool:
        """Whether a message holds the text of a token that only the template may write."""
        pattern = self._control_tokens
        return any(
            pattern.search(text)
            for message in conversation
            for key, value in message.items()
            if key != "role"
            for text in strings_in(value)
        )

    def count_tokens(self, conversation: Conversation) -> int:
        """Tokens of the rendered conversation, BOS included, uncut."""
        return len(self._tokens([conversation])[0][0])

    def _windows(self, conversation: Conversation, ends: list[int]) -> list[Conversation]:
        head, exchanges = _exchanges(conversation)
        if len(exchanges) != len(ends):  # the template marks something else than single answers
            return [conversation]
        whole = self.with_system_prompt(conversation)
        system = [message["content"] for message in whole[:1] if message["role"] == "system"]
        # Approximate (a template may join the system text to the first turn): `encode` still cuts.
        overhead = self._frame + sum(len(self._plain_ids(text)) for text in system)
        lengths = [end - start for start, end in pairwise([overhead, *ends])]
        groups = _fill(lengths, self.max_length - overhead, _MIN_WINDOW_SHARE)
        return [
            head + [message for number in group for message in exchanges[number]]
            for group in groups
        ]

    def _tokens(self, conversations: Sequence[Conversation]) -> list[tuple[list[int], list[int]]]:
        """Ids and assistant mask of each whole conversation, BOS in front where it belongs."""
        rows: list[tuple[list[int], list[int]]] = []
        whole = [self.with_system_prompt(each) for each in conversations]
        for tools, group in groupby(whole, key=tools_of):  # a batch shares its definitions
            encoded: Any = self.tokenizer.apply_chat_template(
                list(group),
                chat_template=self.template,
                tools=tools,
                return_dict=True,
                **self.options,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},  # no warning about lengths that are cut later
            )
            pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
            rows += [self._with_bos(ids, mask) for ids, mask in pairs]
        return rows

    def _with_bos(self, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise DataError(
                f"The chat template writes the BOS token {self.tokenizer.bos_token!r} twice at the "
                "start of a conversation; the model expects it once. Remove one from "
                "chat_template.jinja in the checkpoint's folder."
            )
        if self._bos is None or ids[:1] == [self._bos]:
            return ids, mask
        return [self._bos, *ids], [0, *mask]

    def _fitted(self, ids: list[int], mask: list[int]) -> Encoded:
        limit = self.max_length
        ends = _answer_ends(mask)
        whole_turns = [end for end in ends if end <= limit]
        # Without a whole answer its beginning is used: still the assistant's own words.
        length = whole_turns[-1] if whole_turns else limit
        if not any(mask[1:length]):
            return Encoded(None, NO_ANSWER_FITS, num_tokens=ends[-1] if ends else len(ids))
        labels = [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
        row = Row(ids[:length], labels[:length], "chat")
        return Encoded(row, num_cut_tokens=ends[-1] - length, num_tokens=ends[-1])

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @cached_property
    def _bos(self) -> int | None:
        return expected_bos(self.tokenizer)

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        # Gemma's added tokens include line breaks, which templates write too and people may.
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        written = {token for token in added if token.strip() and token in self.template}
        written |= {self.tokenizer.bos_token, self.tokenizer.eos_token} - {None, ""}
        return re.compile("|".join(map(re.escape, sorted(written))) or "(?!)")

    @cached_property
    def _frame(self) -> int:
        """Tokens before the first turn: BOS, a default system message."""
        bare = replace(self, system_prompt=None)
        one, two = (_answer_ends(mask)[-1] for _, mask in bare._tokens([_EXCHANGE, _EXCHANGE * 2]))
        return one - (two - one)


def _answer_ends(mask: Sequence[int]) -> list[int]:
    """Positions just after each run of assistant tokens."""
    return [i for i, (this, following) in enumerate(pairwise([*mask, 0]), 1) if this > following]


def _exchanges(conversation: Conversation) -> tuple[Conversation, list[Conversation]]:
    """The system message, if any; the rest, cut before every user turn that follows an answer."""
    num_system = 1 if conversation[0]["role"] == "system" else 0
    exchanges: list[Conversation] = []
    previous = ""
    for message in conversation[num_system:]:
        if not exchanges or (message["role"], previous) == ("user", "assistant"):
            exchanges.append([])
        exchanges[-1].append(message)
        previous = message["role"]
    return conversation[:num_system], exchanges


def _fill(lengths: list[int], capacity: int, min_share: float) -> list[range]:
    """Consecutive items in groups of at most `capacity`, without groups below `min_share` of it."""
    groups: list[range] = []
    start, used = 0, 0
    for index, length in enumerate([*lengths, capacity + 1]):
        if used + length > capacity and index > start:
            if used >= min_share * capacity:
                groups.append(range(start, index))
            start, used = index, 0
        used += length
    return groups
