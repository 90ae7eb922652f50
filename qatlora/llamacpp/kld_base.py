"""The file of llama-perplexity's `--kl-divergence-base`, written from any logits and read back.

Source of layout and arithmetic: llama.cpp, tools/perplexity/perplexity.cpp (`log_softmax`,
`process_logits`, `kl_divergence`). Little-endian:

    "_logits_", int32 n_ctx, int32 V, int32 N, int32 tokens [N, n_ctx]
    N chunks of n_ctx - 1 - n_ctx/2 rows:
        float32 scale, float32 lowest, uint16 codes [V], and one more if V is odd

A row is the base's log-probabilities, lowest + scale * code. They reach down to 16 nats below the
likeliest word; what lies deeper has code 0. Scored are the tokens n_ctx/2 + 1 .. n_ctx - 1 of each
chunk, its second half. llama-perplexity puts BOS in the place of a chunk's first token where the
vocabulary asks for one, so put it there beforehand.

Shapes: N chunks, V words, R scored tokens of all chunks. Files are read and written a few rows at a
time.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from qatlora import files
from qatlora.errors import DataError

Floats = NDArray[np.float32]

_MAGIC = b"_logits_"
_HEADER = struct.Struct("<8siii")
_DEPTH_NATS = np.float32(16)
_TOP_CODE = np.float32(65535)
_ROW_HEAD = 4  # scale and lowest, in units of uint16
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class KldBase:
    """A base file.

    Attributes:
        path: the file.
        tokens: int32 [N, n_ctx].
        vocab_size: V.
    """

    path: Path
    tokens: NDArray[np.int32]
    vocab_size: int

    @property
    def targets(self) -> NDArray[np.int32]:
        """The scored tokens, int32 [R]."""
        return self.tokens[:, first_scored(self.tokens.shape[1]) :].reshape(-1)

    def log_probs(self) -> Iterator[Floats]:
        """Yield the base's log-probabilities as float32 [r, V], r rows at a time, R in all."""
        row_codes, row_bytes = _row_codes(self.vocab_size), bytes_per_token(self.vocab_size)
        with self.path.open("rb") as file:
            file.seek(_HEADER.size + self.tokens.nbytes)
            for count in _parts(len(self.targets)):
                raw = np.frombuffer(file.read(count * row_bytes), dtype="<u2")
                yield _decode(raw.reshape(count, row_codes), self.vocab_size)


def bytes_per_token(vocab_size: int) -> int:
    """Size of a base file per scored token."""
    return 2 * _row_codes(vocab_size)


def first_scored(window_tokens: int) -> int:
    """Index of the first token of a window that is scored."""
    return window_tokens // 2 + 1


def write_base(
    path: Path, tokens: NDArray[np.int32], vocab_size: int, logits: Iterable[Floats]
) -> KldBase:
    """Write a base file atomically.

    Args:
        path: where it will lie; it takes 2 bytes per word and scored token.
        tokens: int32 [N, n_ctx], each chunk with its BOS.
        vocab_size: V, as the GGUF will have it.
        logits: float32 [r, V] of the tokens before the scored ones, any r at a time, R in all.

    Raises:
        DataError: the rows are not as many or not as wide as the tokens call for.
    """
    base = KldBase(path, np.ascontiguousarray(tokens, dtype="<i4"), vocab_size)
    num_chunks, window = base.tokens.shape
    num_rows = 0
    with files.replacing(path) as partial, partial.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, window, vocab_size, num_chunks))
        file.write(base.tokens.tobytes())
        for part in logits:
            num_rows += _write_rows(file, part, vocab_size)
        if num_rows != len(base.targets):
            raise DataError(
                f"{num_rows} rows of logits were given for {num_chunks} chunks of {window} tokens, "
                f"of which {len(base.targets)} are scored: give one row per scored token."
            )
    return base


def read_base(path: Path) -> KldBase:
    """Read the head of a base file and check its size.

    Raises:
        DataError: it is no such file, or cut off.
    """
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or head[:8] != _MAGIC:
            raise DataError(
                f"{path} begins with {head[:8]!r} instead of {_MAGIC!r}: it is no file of "
                "llama-perplexity --kl-divergence-base. Give one that was made without "
                "--kl-divergence."
            )
        _, window, vocab_size, num_chunks = _HEADER.unpack(head)
        content = file.read(4 * window * num_chunks)
    num_rows = num_chunks * (window - first_scored(window))
    expected = _HEADER.size + 4 * window * num_chunks + num_rows * bytes_per_token(vocab_size)
    if (found := path.stat().st_size) != expected:
        raise DataError(
            f"{path} has {found} bytes and its head announces {expected}: it was cut off. Write it "
            "again."
        )
    tokens = np.frombuffer(content, dtype="<i4").reshape(num_chunks, window)
    return KldBase(path, tokens, vocab_size)


def _row_codes(vocab_size: int) -> int:
    return _ROW_HEAD + vocab_size + vocab_size % 2


def _parts(num_rows: int) -> Iterator[int]:
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        yield min(_ROWS_AT_ONCE, num_rows - start)


def _write_rows(file: BinaryIO, logits: Floats, vocab_size: int) -> int:
    if logits.ndim != 2 or logits.shape[1] != vocab_size:
        raise DataError(
            f"Logits of shape {logits.shape} were given for {vocab_size} words: both models need "
            "the same vocabulary, padding included."
        )
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        file.write(_encode(logits[start : start + _ROWS_AT_ONCE]).tobytes())
    return len(logits)


def _encode(logits: Floats) -> NDArray[np.uint16]:
    """Rows of the file from logits [r, V]."""
    logits = logits.astype(np.float32, copy=False)
    top = logits.max(axis=1, keepdims=True)
    lowest = np.maximum(logits.min(axis=1, keepdims=True), top - _DEPTH_NATS)
    scale = (top - lowest) / _TOP_CODE
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    rows = np.zeros((len(logits), _row_codes(logits.shape[1])), dtype="<u2")
    head = np.concatenate([scale, lowest - top - log_sum_exp(logits - top)], axis=1)
    rows[:, :_ROW_HEAD] = head.astype("<f4").view("<u2")
    codes = np.rint((logits - lowest) * inverse)
    rows[:, _ROW_HEAD : _ROW_HEAD + logits.shape[1]] = codes.clip(0, _TOP_CODE)
    return rows


def _decode(rows: NDArray[np.uint16], vocab_size: int) -> Floats:
    scale, lowest = np.ascontiguousarray(rows[:, :_ROW_HEAD]).view("<f4").T[:, :, None]
    log_probs: Floats = rows[:, _ROW_HEAD : _ROW_HEAD + vocab_size].astype(np.float32)
    log_probs *= scale
    log_probs += lowest
    return log_probs


def log_sum_exp(below_top: Floats) -> Floats:
    """Log of the sum of exponentials of logits less their maximum [r, V]: float32 [r, 1]."""
    sums = np.exp(below_top).sum(axis=1, keepdims=True, dtype=np.float64)
    return np.log(sums).astype(np.float32)
