"""The data of a run: what is trained, in which order, and what is held out of it.

The held-out conversations are those with the smallest digests: the same for every seed, each on one
side with all its copies. Only as many training conversations are rendered as the run needs.

Every step gets the same mixture: `rows_per_step - replay_rows_per_step` chat rows and then
`replay_rows_per_step` rows of general text, so that no step lacks the term against forgetting.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qatlora import registry
from qatlora.config import DataConfig, DataKind
from qatlora.data.chats import Chats
from qatlora.data.course import ChatCourse
from qatlora.data.encode import ChatEncoder
from qatlora.data.mix import MixedText, mixed_rows, spread
from qatlora.data.prompts import choose_prompts
from qatlora.data.rows import Batches, Row, Text
from qatlora.data.sources import ChatMixture, open_conversations
from qatlora.data.templates import training_template, turn_rules
from qatlora.data.text import GeneralText, held_out_rows, open_general
from qatlora.errors import ConfigError, DataError

MIN_CONVERSATIONS = 8
"""Different conversations below which nothing can be held out."""

_MAX_HELD_OUT_SHARE = 0.1


def load_data(
    settings: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    max_steps: int,
    rows_per_step: int,
) -> Batches:
    """Training rows for `max_steps` steps, held-out texts and prompts.

    Args:
        settings: where conversations and general text come from, and how much is held out.
        tokenizer: a fast tokenizer with a chat template.
        seed: order of conversations and general text in training; what is held out ignores it.
        max_steps: optimizer steps.
        rows_per_step: rows of a step, general ones included.

    Raises:
        DataError: the data, the chat template or the amount of either will not do.
        ConfigError: the settings contradict each other.
    """
    num_replay_rows = settings.replay_rows_per_step
    num_chat_rows = _num_chat_rows(settings, rows_per_step)
    max_length = settings.max_length_tokens
    template = training_template(tokenizer)
    encoder = ChatEncoder(tokenizer, template, max_length, settings.system_prompt)
    chats = open_conversations(settings, turn_rules(tokenizer, template))
    general = open_general(settings.general, registry.locate)
    training, held_out = split_conversations(chats, settings.eval_rows)

    course = ChatCourse(chats, encoder, cuts_long(settings), settings.packing)
    chat_rows = weighted_rows(course, training, max_steps * num_chat_rows, seed)
    texts_of_replay = _open_mix(settings, general)
    replay = mixed_rows(texts_of_replay, tokenizer, max_length, max_steps * num_replay_rows, seed)
    train = interleave(chat_rows, replay, max_steps)

    task = ChatCourse(chats, encoder, cuts_long(settings)).held_out_rows(
        held_out, settings.eval_tokens
    )
    kept = held_out_rows(general, tokenizer, max_length, settings.eval_tokens)
    texts = [Text("task", task), Text("general", kept)]
    unseen = (chats[index] for index in held_out)
    prompts = choose_prompts(unseen, course.user_turns, encoder, settings.num_prompts)

    notes: dict[str, Any] = {
        "chats": _about_chats(course, len(held_out)),
        "general": _about_general(general),
        "replay": {part.name: part.weight for part in texts_of_replay},
        "train": count(train, max_length),
        "held_out": {text.name: count(text.rows, max_length) for text in texts},
    }
    return Batches(train, texts, prompts, notes)


def split_conversations(chats: Chats, max_held_out: int) -> tuple[list[int], list[int]]:
    """Indices for training (ascending) and held out (by digest); copies are on one side.

    A tenth is held out, at least one conversation and at most `max_held_out` different ones.

    Raises:
        DataError: fewer than `MIN_CONVERSATIONS` different conversations.
    """
    different = sorted(set(chats.digests))
    if len(different) < MIN_CONVERSATIONS:
        raise DataError(
            f"{chats.name} has {len(different)} different conversations, and some must be held out "
            f"to measure what was learned: at least {MIN_CONVERSATIONS} are needed. Add "
            "conversations, or cut long ones into several."
        )
    num_held_out = min(max_held_out, max(1, int(_MAX_HELD_OUT_SHARE * len(different))))
    limit = different[num_held_out - 1]
    training = [i for i, digest in enumerate(chats.digests) if digest > limit]
    held_out = {digest: i for i, digest in enumerate(chats.digests) if digest <= limit}
    return training, [held_out[digest] for digest in different[:num_held_out]]


def cuts_long(settings: DataConfig) -> bool:
    """Whether a long conversation becomes several rows: talk without a task bears it."""
    return settings.kind is DataKind.chitchat


def weighted_rows(
    course: ChatCourse, training: Sequence[int], num_rows: int, seed: int
) -> list[Row]:
    """`num_rows` rows of the conversations `training`, each set by its weight, spread evenly."""
    mixture = course.chats
    order = spread(mixture.weights, num_rows)
    rows = [
        iter(course.training_rows(indices, order.count(number), seed))
        for number, indices in enumerate(mixture.by_part(training))
    ]
    return [next(rows[number]) for number in order]


def interleave(chat: Sequence[Row], replay: Sequence[Row], num_steps: int) -> list[Row]:
    """One list of rows in which every step has the same number of both kinds, chats first."""
    num_chat, num_replay = len(chat) // num_steps, len(replay) // num_steps
    rows: list[Row] = []
    for step in range(num_steps):
        rows += chat[step * num_chat : (step + 1) * num_chat]
        rows += replay[step * num_replay : (step + 1) * num_replay]
    return rows


def count(rows: Sequence[Row], max_length: int) -> dict[str, float]:
    """Rows, tokens, scored tokens, and the share of padding if every row were `max_length` long."""
    num_tokens = sum(len(row.input_ids) for row in rows)
    return {
        "rows": len(rows),
        "tokens": num_tokens,
        "scored_tokens": sum(row.num_scored_tokens for row in rows),
        "padding_share": round(1 - num_tokens / (len(rows) * max_length), 4),
    }


def _num_chat_rows(settings: DataConfig, rows_per_step: int) -> int:
    num_chat_rows = rows_per_step - settings.replay_rows_per_step
    if num_chat_rows < 1:
        raise ConfigError(
            f"data.replay_rows_per_step={settings.replay_rows_per_step} leaves no room for a "
            f"conversation in train.rows_per_step={rows_per_step}. Raise train.rows_per_step."
        )
    return num_chat_rows


def _open_mix(settings: DataConfig, general: GeneralText) -> list[MixedText]:
    """The texts of the replay rows, each without its own held-out part."""
    if not settings.replay_mix:
        return [MixedText(settings.general, general, 1.0)]
    return [
        MixedText(
            name,
            general if name == settings.general else open_general(name, registry.locate),
            weight,
        )
        for name, weight in settings.replay_mix.items()
    ]


def _about_chats(course: ChatCourse, num_held_out: int) -> dict[str, Any]:
    chats = course.chats
    return {
        "name": chats.name,
        "format": chats.format,
        "licence": chats.licence,
        "conversations": len(chats),
        "held_out": num_held_out,
        "used": course.num_used,
        "epochs": course.num_epochs,
        "cut_tokens": course.num_cut_tokens,
        "dropped": dict(chats.dropped),
        "dropped_while_encoding": dict(course.dropped),
    } | _about_parts(chats)


def _about_parts(chats: ChatMixture) -> dict[str, Any]:
    """The sets of a mixture by name; nothing where there is one."""
    if len(chats.parts) == 1:
        return {}
    return {
        "files": {
            part.name: {"format": part.format, "conversations": len(part), "weight": weight}
            for part, weight in zip(chats.parts, chats.weights, strict=True)
        }
    }


def _about_general(general: GeneralText) -> dict[str, Any]:
    return {
        "name": general.name,
        "licence": general.licence,
        "training_documents": len(general.training),
        "held_out_documents": len(general.held_out),
    }
