"""Scores against a plain double-precision reference, statistics against numpy's definitions."""

from pathlib import Path

import numpy as np
import pytest

from qatlora.errors import DataError
from qatlora.llamacpp.kld_base import KldBase, write_base
from qatlora.llamacpp.kld_statistics import score_against, statistics_of

WINDOW, VOCAB = 101, 33


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    base = random.normal(0, 4, (150, VOCAB)).astype(np.float32)
    return base, base + random.normal(0, 0.3, base.shape).astype(np.float32)


@pytest.fixture
def base(logits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> KldBase:
    tokens = np.random.default_rng(3).integers(0, VOCAB, (3, WINDOW)).astype(np.int32)
    return write_base(tmp_path / "base", tokens, VOCAB, [logits[0]])


def log_softmax(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    return wide - np.log(np.exp(wide).sum())


def test_scores_are_those_of_a_loop_over_words(logits, base: KldBase):
    scores = score_against(base, iter([logits[1][:70], logits[1][70:]]))
    known = np.concatenate(list(base.log_probs()))
    for i, token in enumerate(base.targets):
        p, q = known[i].astype(np.float64), log_softmax(logits[1][i])
        kld = sum(np.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > -16)
        assert scores.kld[i] == pytest.approx(kld, abs=2e-6)
        assert scores.nll[i] == pytest.approx(-q[token], abs=2e-6)
        assert scores.base_nll[i] == pytest.approx(-p[token], abs=2e-6)
        assert scores.same_top[i] == (p.argmax() == q.argmax())


def test_a_file_compared_with_itself_has_no_divergence_at_all(base: KldBase):
    scores = score_against(base, base.log_probs(), normalized=True)
    assert (scores.kld == 0).all()
    assert scores.same_top.all()
    assert (scores.nll == scores.base_nll).all()


def test_two_files_are_compared_as_their_logits_are(logits, base: KldBase, tmp_path: Path):
    flat = [part / 4 for part in logits]  # no word lies 16 nats below the top
    files = [
        write_base(tmp_path / name, base.tokens, VOCAB, [part])
        for name, part in zip(("base", "other"), flat, strict=True)
    ]
    by_file = statistics_of(score_against(files[0], files[1].log_probs(), normalized=True))
    by_logits = statistics_of(score_against(files[0], [flat[1]]))
    for label in ("Mean KLD", "99.0% KLD", "Mean PPL(Q)", "Mean PPL(Q)/PPL(base)"):
        assert by_file[label].value == pytest.approx(by_logits[label].value, rel=1e-2, abs=1e-5)


def test_statistics_are_those_of_numpy(logits, base: KldBase):
    scores = score_against(base, [logits[1]])
    lines = statistics_of(scores)
    nll, base_nll = scores.nll.astype(np.float64), scores.base_nll.astype(np.float64)
    dp = 100 * (np.exp(-nll) - np.exp(-base_nll))
    root = np.sqrt(len(nll))
    assert lines["Mean KLD"].error == pytest.approx(scores.kld.std(ddof=1) / root, rel=1e-4)
    assert lines["95.0% KLD"].value == pytest.approx(np.quantile(scores.kld, 0.95), rel=1e-4)
    assert lines["25.0% Δp"].value == pytest.approx(np.quantile(dp, 0.25), abs=1e-4)
    correlation = 100 * np.corrcoef(nll, base_nll)[0, 1]
    assert lines["Cor(ln(PPL(Q)), ln(PPL(base)))"].value == pytest.approx(correlation)
    ratio = lines["Mean ln(PPL(Q)/PPL(base))"]
    assert ratio.value == pytest.approx((nll - base_nll).mean())
    assert ratio.error == pytest.approx((nll - base_nll).std(ddof=1) / root)
    assert lines["RMS Δp"].value == pytest.approx(np.sqrt((dp**2).mean()), rel=1e-5)
    assert lines["Same top p"].value == pytest.approx(100 * scores.same_top.mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [rows[:149]], "they end before"),
        (lambda rows: [rows, rows[:1]], "more rows than the 150"),
        (lambda rows: [rows[:, :-1]], r"rows of shape \(150, 32\)"),
    ],
)
def test_rows_of_other_tokens_or_words_are_refused(change, message, logits, base: KldBase):
    with pytest.raises(DataError, match=message):
        score_against(base, change(logits[1]))
