"""Every figure of llama-perplexity `--kl-divergence`, computed here from a base file and logits.

Source of all definitions: llama.cpp, tools/perplexity/perplexity.cpp, `kl_divergence`:

- the standard error of a mean is sqrt((E[x^2] - E[x]^2) / (n - 1)); covariances likewise;
- a percentile interpolates linearly at fraction * (n - 1), in float32;
- KL(base || model) sums over the words to which the base gives more than exp(-16).

One difference: the program gives 0 for the error of 10 tokens or fewer, which a guard would take
for certainty. It prints no statistics below `MIN_TOKENS` tokens.

Shapes: V words, r rows at a time, R scored tokens in all.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qatlora.errors import DataError
from qatlora.llamacpp.kld_base import Floats, KldBase, log_sum_exp

MIN_TOKENS = 100
"""Scored tokens below which llama-perplexity prints no statistics."""

_SMALLEST_LOG_PROB = np.float32(-16)
_KLD_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 10.0, 5.0, 1.0, 0.1)
_DP_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 25.0, 10.0, 5.0, 1.0, 0.1)


@dataclass(frozen=True)
class Figure:
    """One line of the program: a value and, where it prints one, its standard error."""

    value: float
    error: float | None = None


Statistics = dict[str, Figure]
"""Label of a line, with single spaces, to its figure. Unit as printed: nats, percent for dp."""


@dataclass(frozen=True)
class PairScores:
    """A model and a base on the same R tokens, float32 [R] but for `same_top`.

    Attributes:
        nll: -log P_model(token), nats.
        base_nll: -log P_base(token), nats.
        kld: KL(base || model), nats.
        same_top: bool [R], both have the same likeliest word.
    """

    nll: Floats
    base_nll: Floats
    kld: Floats
    same_top: NDArray[np.bool_]


def score_against(
    base: KldBase, logits: Iterable[Floats], *, normalized: bool = False
) -> PairScores:
    """Compare a model's logits with a base file.

    Args:
        base: the file.
        logits: float32 [r, V] of the same tokens, any r at a time, R in all.
        normalized: they are log-probabilities, as another file's `log_probs` are. Those must not
            be normalized again: the words that lie too deep for a file add up.

    Raises:
        DataError: the rows are not as many or not as wide as the file's.
    """
    parts, done = [], 0
    for known, own in _paired(base, logits):
        normalizer = np.zeros((len(own), 1), np.float32) if normalized else _normalizer(own)
        parts.append(_score(known, own, normalizer, base.targets[done : done + len(own)]))
        done += len(own)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return PairScores(*columns)


def statistics_of(scores: PairScores) -> Statistics:
    """The lines of the program in its order."""
    dp = np.exp(-scores.nll) - np.exp(-scores.base_nll)
    top, top_error = mean_and_error(scores.same_top)
    rms, rms_error = root_mean_square(dp)
    return {
        **_perplexities(scores),
        "Mean KLD": Figure(*mean_and_error(scores.kld)),
        **_distribution(scores.kld, "KLD", _KLD_PERCENTILES, 1.0),
        "Mean Δp": Figure(*(100 * x for x in mean_and_error(dp))),
        **_distribution(dp, "Δp", _DP_PERCENTILES, 100.0),
        "RMS Δp": Figure(100 * rms, 100 * rms_error),
        "Same top p": Figure(100 * top, 100 * top_error),
    }


def mean_and_error(values: NDArray[np.generic]) -> tuple[float, float]:
    """Mean and standard error of values [n], n >= 2."""
    wide = values.astype(np.float64)
    return float(wide.mean()), float(wide.std(ddof=1) / math.sqrt(len(wide)))


def root_mean_square(values: NDArray[np.floating]) -> tuple[float, float]:
    """Root mean square of values [n] and its standard error, to first order."""
    square, error = mean_and_error(values.astype(np.float64) ** 2)
    root = math.sqrt(square)
    return root, 0.5 / root * error if root else 0.0


def percentile(ascending: Floats, fraction: float) -> float:
    """Linear interpolation at fraction * (n - 1) of ascending values."""
    position = np.float32(fraction) * np.float32(len(ascending) - 1)
    index = int(position)
    rest = np.float32(position - np.float32(index))
    above = ascending[min(index + 1, len(ascending) - 1)]
    return float((np.float32(1) - rest) * ascending[index] + rest * above)


def _paired(base: KldBase, logits: Iterable[Floats]) -> Iterator[tuple[Floats, Floats]]:
    """Cut the model's rows where the file's parts end."""
    rows = iter(logits)
    waiting = np.empty((0, base.vocab_size), dtype=np.float32)
    for known in base.log_probs():
        while len(waiting) < len(known):
            part = next(rows, None)
            if part is None or part.shape[1:] != (base.vocab_size,):
                found = "they end" if part is None else f"there are rows of shape {part.shape}"
                raise DataError(
                    f"{base.path} has {len(base.targets)} rows of {base.vocab_size} words, and of "
                    f"the model's {found} before: run it on the tokens of the file, with the same "
                    "vocabulary."
                )
            waiting = np.concatenate([waiting, part]) if len(waiting) else part
        yield known, waiting[: len(known)]
        waiting = waiting[len(known) :]
    if len(waiting) or next(rows, None) is not None:
        raise DataError(
            f"The model has more rows than the {len(base.targets)} of {base.path}: run it on the "
            "tokens of the file."
        )


def _normalizer(logits: Floats) -> Floats:
    top = logits.max(axis=1, keepdims=True)
    return top + log_sum_exp(logits - top)


def _score(
    base: Floats, logits: Floats, normalizer: Floats, targets: NDArray[np.int32]
) -> tuple[NDArray[np.generic], ...]:
    rows = np.arange(len(targets))
    terms = np.exp(base)
    terms *= base - logits + normalizer
    terms[base <= _SMALLEST_LOG_PROB] = 0
    return (
        normalizer[:, 0] - logits[rows, targets],
        -base[rows, targets],
        terms.sum(axis=1, dtype=np.float64).astype(np.float32),
        base.argmax(axis=1) == logits.argmax(axis=1),
    )


def _perplexities(scores: PairScores) -> Statistics:
    (own, own_error), (base, base_error) = (
        mean_and_error(nll) for nll in (scores.nll, scores.base_nll)
    )
    wide = scores.nll.astype(np.float64), scores.base_nll.astype(np.float64)
    covariance = float(np.cov(*wide)[0, 1]) / len(scores.nll)
    ratio, ratio_error = mean_and_error(wide[0] - wide[1])
    own_ppl, base_ppl = math.exp(own), math.exp(base)
    own_spread, base_spread = own_ppl * own_error, base_ppl * base_error
    variance = own_spread**2 + base_spread**2 - 2 * own_ppl * base_ppl * covariance
    return {
        "Mean PPL(Q)": Figure(own_ppl, own_spread),
        "Mean PPL(base)": Figure(base_ppl, base_spread),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": Figure(100 * covariance / (own_error * base_error)),
        "Mean ln(PPL(Q)/PPL(base))": Figure(ratio, ratio_error),
        "Mean PPL(Q)/PPL(base)": Figure(math.exp(ratio), math.exp(ratio) * ratio_error),
        "Mean PPL(Q)-PPL(base)": Figure(own_ppl - base_ppl, math.sqrt(max(variance, 0.0))),
    }


def _distribution(
    values: Floats, name: str, percents: tuple[float, ...], unit: float
) -> Statistics:
    """Maximum, percentiles around the median, minimum."""
    ascending = np.sort(values.astype(np.float32))
    at = {f"{p:.1f}% {name}": Figure(unit * percentile(ascending, p / 100)) for p in percents}
    above = {label: at[label] for label, p in zip(at, percents, strict=True) if p > 50}
    return {
        f"Maximum {name}": Figure(unit * float(ascending[-1])),
        **above,
        f"Median {name}": Figure(unit * percentile(ascending, 0.5)),
        **at,
        f"Minimum {name}": Figure(unit * float(ascending[0])),
    }
