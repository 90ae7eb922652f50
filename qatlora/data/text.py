"""General text: what a fine-tune should not forget, replayed in training and measured held out.

The named texts are the calibration files of the package `exllamav3`. Training and evaluation never
share a document:

- texts whose documents are marked (wiki: articles; c4: one page per line; tiny: stories) are split
  by a hash of each document: a tenth is held out, whatever the seed, and copies fall on one side;
- the others, and a user's own file, are split by place: the last tenth of the paragraphs is held
  out, except those that also stand in the rest.

Text is cut into windows of `max_length` tokens, each with BOS in front if the tokenizer sets one
(see `encode.expected_bos`); every token but the first of a window is scored. Documents of one part
follow each other with an empty line between, so that windows are full.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qatlora.data.encode import expected_bos
from qatlora.data.rows import IGNORED, Row, first_rows
from qatlora.errors import DataError
from qatlora.paths import user_path

_HELD_OUT_SHARE = 0.1
_DOCUMENTS_PER_BATCH = 64
_MIN_SCORED_TOKENS = 16
_MIN_ARTICLE_CHARACTERS = 200
_ARTICLE = re.compile(r'<doc id=[^\n]*">\n(.*?)\n</doc>', re.DOTALL)


@dataclass(frozen=True)
class _Kind:
    split: Callable[[str], list[str]]
    documents: bool
    licence: str


def _articles(text: str) -> list[str]:
    """Articles that are more than a title or a redirect."""
    return [each for each in _ARTICLE.findall(text) if len(each) >= _MIN_ARTICLE_CHARACTERS]


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _stories(text: str) -> list[str]:
    return text.split("<|endoftext|>")


_UNDECLARED = "not declared by the package (exllamav3 itself: MIT)"
_NAMED = {
    "wiki": _Kind(_articles, documents=True, licence="CC BY-SA (Wikipedia)"),
    "c4": _Kind(str.splitlines, documents=True, licence=_UNDECLARED),
    "code": _Kind(_paragraphs, documents=False, licence=_UNDECLARED),
    "technical": _Kind(_paragraphs, documents=False, licence=_UNDECLARED),
    "multilingual": _Kind(_paragraphs, documents=False, licence=_UNDECLARED),
    "tiny": _Kind(_stories, documents=True, licence=_UNDECLARED),
}
_OWN_FILE = _Kind(_paragraphs, documents=False, licence="the user's own")


@dataclass(frozen=True)
class GeneralText:
    """A text in two parts that share no document.

    Attributes:
        name: what the report calls it.
        licence: of the text.
        training: documents for replay.
        held_out: documents for evaluation.
    """

    name: str
    licence: str
    training: list[str]
    held_out: list[str]


def open_general(name: str, locate: Callable[[str], Path]) -> GeneralText:
    """Read a named text, or a user's own text file, and split it.

    Args:
        name: wiki, c4, code, technical, multilingual, tiny, or a path.
        locate: finds the folder of a registry package (`qatlora.registry.locate`).

    Raises:
        DataError: no such name or file, not UTF-8, or too little text to be split.
    """
    if name in _NAMED:
        kind = _NAMED[name]
        folder = locate("exllamav3")
        path = folder / "exllamav3" / "conversion" / "standard_cal_data" / f"{name}.utf8"
        label = f"{name} (calibration text of exllamav3)"
    else:
        kind, path, label = _OWN_FILE, user_path("data.general", name), name
    documents = [each.strip() for each in kind.split(_read(path)) if each.strip()]
    training, held_out = (_by_hash if kind.documents else _by_place)(documents)
    if not training or not held_out:
        raise DataError(
            f"{path} has {len(documents)} documents or paragraphs, too few to hold a tenth of them "
            "out of training. Give a longer text with empty lines between its paragraphs."
        )
    return GeneralText(label, kind.licence, training, held_out)


def replay_rows(
    text: GeneralText,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    num_rows: int,
    rng: random.Random,
) -> list[Row]:
    """`num_rows` full windows of the training part, in an order drawn from `rng`.

    Starts over in another order when the text is used up.

    Raises:
        DataError: the text does not fill one window.
    """
    rows: list[Row] = []
    while len(rows) < num_rows:
        documents = rng.sample(text.training, len(text.training))
        num_before = len(rows)
        for row in windows(documents, tokenizer, max_length):
            if len(row.input_ids) == max_length:
                rows.append(row)
            if len(rows) == num_rows:
                break
        if len(rows) == num_before:
            raise DataError(
                f"The general text {text.name} does not fill one row of {max_length} tokens. Give "
                "a longer text in data.general, or lower data.max_length_tokens."
            )
    return rows


def held_out_rows(
    text: GeneralText, tokenizer: PreTrainedTokenizerBase, max_length: int, num_tokens: int
) -> list[Row]:
    """Windows of the held-out part with at most `num_tokens` scored tokens (at least one window).

    The same for every seed, so that runs can be compared.

    Raises:
        DataError: there is too little text to score.
    """
    rows = first_rows(windows(text.held_out, tokenizer, max_length), num_tokens)
    total = sum(row.num_scored_tokens for row in rows)
    if total < min(_MIN_SCORED_TOKENS, num_tokens):
        raise DataError(
            f"The held-out tenth of the general text {text.name} has {total} tokens, too few for a "
            "perplexity. Give a longer text in data.general."
        )
    return rows


def windows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[Row]:
    """Full windows of documents that follow each other, then the remainder."""
    bos = expected_bos(tokenizer)
    start = [] if bos is None else [bos]
    ids = start.copy()
    for first in range(0, len(documents), _DOCUMENTS_PER_BATCH):
        batch = [text + "\n\n" for text in documents[first : first + _DOCUMENTS_PER_BATCH]]
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)
        for document_ids in encoded.input_ids:
            ids += document_ids
            while len(ids) >= max_length:
                yield _row(ids[:max_length])
                ids = start + ids[max_length:]
    if len(ids) > 1:
        yield _row(ids)


def _row(ids: list[int]) -> Row:
    return Row(ids, [IGNORED, *ids[1:]], "general")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"The general text {path} is not UTF-8 (byte {error.start}). Convert it, or unpack it "
            "if it is compressed."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"The general text {str(path)!r} cannot be read: {reason}. data.general must be one of "
            f"{', '.join(_NAMED)}, or the path of a text file."
        ) from error


def _by_hash(documents: list[str]) -> tuple[list[str], list[str]]:
    def digest(text: str) -> bytes:
        return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()

    limit = int(_HELD_OUT_SHARE * 2**64).to_bytes(8, "big")
    held_out = sorted((each for each in documents if digest(each) < limit), key=digest)
    return [each for each in documents if digest(each) >= limit], held_out


def _by_place(documents: list[str]) -> tuple[list[str], list[str]]:
    num_held_out = max(1, round(_HELD_OUT_SHARE * len(documents)))
    training, tail = documents[:-num_held_out], documents[-num_held_out:]
    known = set(training)
    return training, [each for each in tail if each not in known]
