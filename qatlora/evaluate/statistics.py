"""Statistics over tokens, as llama-perplexity --kl-divergence prints them.

The definitions are those of `qatlora.llamacpp.kld_statistics`; here they are applied to scores of
any tokens, where the program scores half windows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlora.errors import DataError
from qatlora.evaluate.scores import TokenScores
from qatlora.llamacpp import kld_statistics
from qatlora.report.results_fidelity import KldStatistics


@dataclass(frozen=True)
class Mean:
    """A mean over tokens and its standard error, in the unit of its values."""

    value: float
    stderr: float


@dataclass(frozen=True)
class PerplexityRatio:
    """A model's perplexity over its reference's on the same tokens.

    Attributes:
        reference, reference_stderr: the reference's perplexity.
        ratio, ratio_stderr: model over reference, paired by token: llama-perplexity's "Mean
            PPL(Q)/PPL(base)".
    """

    reference: float
    reference_stderr: float
    ratio: float
    ratio_stderr: float


@dataclass(frozen=True)
class TextScores:
    """A model on a text.

    Attributes:
        num_tokens: scored tokens.
        mean_nll, nll_stderr: nats per token.
        perplexity: exp(mean_nll).
        kld: divergence from the reference, None without one.
        against: perplexity beside the reference's, None without one.
    """

    num_tokens: int
    mean_nll: float
    nll_stderr: float
    perplexity: float
    kld: KldStatistics | None = None
    against: PerplexityRatio | None = None

    @property
    def perplexity_stderr(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.nll_stderr


def summarize(scores: TokenScores) -> TextScores:
    """Reduce scores per token to the statistics of a text.

    Raises:
        DataError: fewer than two tokens were scored.
    """
    nll = mean_of(scores.nll)
    kld, against = None, None
    if scores.kld is not None and scores.same_top is not None and scores.reference_nll is not None:
        kld = _summarize_kld(scores.kld, scores.same_top, scores.nll, scores.reference_nll)
        against = _perplexity_ratio(scores.nll, scores.reference_nll)
    return TextScores(len(scores.nll), nll.value, nll.stderr, _exp(nll.value), kld, against)


def mean_of(values: Tensor) -> Mean:
    """Mean and standard error of values [n], n >= 2."""
    if len(values) < 2:
        raise DataError(
            f"{len(values)} tokens were scored: a standard error needs at least 2. "
            "Give a longer held-out text."
        )
    return Mean(*kld_statistics.mean_and_error(values.numpy()))


def mean_difference(nll: Tensor, other_nll: Tensor) -> Mean:
    """Paired difference mean(nll - other_nll) of two models on the same tokens [n], in nats.

    Paired, because most of the spread between tokens is common to both models: the standard error
    is far below that of either mean. Equals llama-perplexity's "Mean ln(PPL(Q)/PPL(base))".

    Raises:
        DataError: the numbers of tokens differ, or fewer than two.
    """
    if nll.shape != other_nll.shape:
        raise DataError(
            f"{len(nll)} tokens cannot be paired with {len(other_nll)}: both models must be "
            "scored on the same rows with the same tokenizer."
        )
    return mean_of(nll.double() - other_nll.double())


def percentile(sorted_values: Tensor, fraction: float) -> float:
    """Linear interpolation at fraction * (n - 1) of ascending float32 values, like llama.cpp."""
    return kld_statistics.percentile(sorted_values.numpy(), fraction)


def _summarize_kld(
    kld: Tensor, same_top: Tensor, nll: Tensor, reference_nll: Tensor
) -> KldStatistics:
    mean, top = mean_of(kld), mean_of(same_top)
    ordered = kld.float().sort().values
    dp = torch.exp(-nll.double()) - torch.exp(-reference_nll.double())
    rms_dp, rms_dp_stderr = kld_statistics.root_mean_square(dp.numpy())
    return KldStatistics(
        mean=mean.value,
        mean_stderr=mean.stderr,
        median=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p95=percentile(ordered, 0.95),
        p99=percentile(ordered, 0.99),
        p999=percentile(ordered, 0.999),
        max=ordered[-1].item(),
        min=ordered[0].item(),
        same_top=top.value,
        same_top_stderr=top.stderr,
        rms_dp=rms_dp,
        rms_dp_stderr=rms_dp_stderr,
    )


def _perplexity_ratio(nll: Tensor, reference_nll: Tensor) -> PerplexityRatio:
    reference, log_ratio = mean_of(reference_nll), mean_difference(nll, reference_nll)
    perplexity, ratio = _exp(reference.value), _exp(log_ratio.value)
    return PerplexityRatio(
        perplexity, perplexity * reference.stderr, ratio, ratio * log_ratio.stderr
    )


def _exp(mean_nll: float) -> float:
    """exp, infinite where a double overflows: a broken model is a figure, not a crash."""
    return math.exp(mean_nll) if mean_nll < 709 else math.inf
