"""The base file: its bytes by the layout, what is read back, what is refused."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from qatlora.errors import DataError
from qatlora.llamacpp.kld_base import first_scored, read_base, write_base

WINDOW, VOCAB = 9, 7
TOKENS = np.arange(2 * WINDOW, dtype=np.int32).reshape(2, WINDOW) % VOCAB
NUM_ROWS = 2 * (WINDOW - 1 - WINDOW // 2)


def some_logits(num_rows: int = NUM_ROWS, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 6, (num_rows, vocab)).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return (
        wide
        - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - (wide.max(-1, keepdims=True))
    )


def test_the_bytes_are_those_of_the_layout(tmp_path: Path):
    logits = some_logits()
    logits[0, 3] = -50  # deeper than 16 nats
    write_base(tmp_path / "base", TOKENS, VOCAB, [logits])
    content = (tmp_path / "base").read_bytes()
    assert content[:20] == b"_logits_" + struct.pack("<iii", WINDOW, VOCAB, 2)
    assert content[20 : 20 + TOKENS.nbytes] == TOKENS.tobytes()
    rows = content[20 + TOKENS.nbytes :]
    row_bytes = 8 + 2 * VOCAB + 2  # an odd vocabulary is padded
    assert len(rows) == NUM_ROWS * row_bytes
    for index, (row, exact) in enumerate(zip(logits, log_softmax(logits), strict=True)):
        scale, lowest, *codes, pad = struct.unpack_from(f"<ff{VOCAB}HH", rows, index * row_bytes)
        assert pad == 0
        assert codes[int(row.argmax())] == 65535
        floor = max(row.min(), row.max() - 16)
        assert lowest == pytest.approx(exact.max() - (row.max() - floor), abs=1e-5)
        assert scale == pytest.approx((row.max() - floor) / 65535)
        assert codes == [max(0, round((float(x) - floor) / scale)) for x in row]


def test_what_was_written_is_read_back_to_half_a_code_down_to_16_nats(tmp_path: Path):
    logits = some_logits()
    written = write_base(tmp_path / "base", TOKENS, VOCAB, [logits[:1], logits[1:6], logits[6:]])
    base = read_base(tmp_path / "base")
    assert base.vocab_size == written.vocab_size == VOCAB
    assert (base.tokens == TOKENS).all()
    assert base.targets.tolist() == TOKENS[:, first_scored(WINDOW) :].reshape(-1).tolist()
    exact = log_softmax(logits)
    exact = np.maximum(exact, exact.max(-1, keepdims=True) - 16)
    found = np.concatenate(list(base.log_probs()))
    assert np.abs(found - exact).max() <= 0.5 * 16 / 65535 + 1e-5


def test_equal_logits_have_no_scale_and_stay_equal(tmp_path: Path):
    write_base(tmp_path / "base", TOKENS, 8, [np.full((NUM_ROWS, 8), 2.5, np.float32)])
    found = np.concatenate(list(read_base(tmp_path / "base").log_probs()))
    assert found == pytest.approx(np.log(1 / 8))


@pytest.mark.parametrize(
    ("rows", "vocab", "message"),
    [(NUM_ROWS - 1, VOCAB, "7 rows of logits"), (NUM_ROWS, VOCAB + 1, r"shape \(8, 8\)")],
)
def test_logits_of_other_tokens_or_words_leave_no_file(
    rows: int, vocab: int, message: str, tmp_path: Path
):
    with pytest.raises(DataError, match=message):
        write_base(tmp_path / "base", TOKENS, VOCAB, [some_logits(rows, vocab)])
    assert not list(tmp_path.iterdir())


def test_another_file_or_a_cut_one_is_refused(tmp_path: Path):
    path = tmp_path / "base"
    write_base(path, TOKENS, VOCAB, [some_logits()])
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="was cut off"):
        read_base(path)
    path.write_bytes(b"GGUF" + content[4:])
    with pytest.raises(DataError, match="begins with b'GGUFits_'"):
        read_base(path)


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    vocab, window = 4096, 65
    tokens = np.zeros((32, window), np.int32)
    num_rows = 32 * (window - first_scored(window))
    tracemalloc.start()
    write_base(tmp_path / "base", tokens, vocab, (some_logits(8, vocab) for _ in range(128)))
    for _ in read_base(tmp_path / "base").log_probs():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_rows * vocab * 2 > 8e6
    assert peak < 2e6
