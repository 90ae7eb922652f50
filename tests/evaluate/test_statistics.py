"""Statistics against numpy and llama-perplexity's formulas written out."""

import math

import numpy as np
import pytest
import torch

from qatlora.errors import DataError
from qatlora.evaluate import (
    TokenScores,
    mean_difference,
    mean_of,
    percentile,
    summarize,
)


def llama_mean_and_uncertainty(values: np.ndarray) -> tuple[float, float]:
    mean = values.sum() / len(values)
    spread = (values**2).sum() / len(values) - mean * mean
    return mean, math.sqrt(spread / (len(values) - 1))


@pytest.fixture
def scores() -> TokenScores:
    generator = torch.Generator().manual_seed(1)
    nll = torch.rand(1001, generator=generator) * 8
    return TokenScores(
        nll,
        torch.rand(1001, generator=generator) ** 6,
        torch.rand(1001, generator=generator) < 0.9,
        nll + 0.1 * torch.randn(1001, generator=generator).abs(),
    )


def test_means_and_standard_errors_are_those_of_llama_perplexity(scores):
    summary = summarize(scores)
    nll, kld = scores.nll.double().numpy(), scores.kld.double().numpy()
    assert (summary.mean_nll, summary.nll_stderr) == pytest.approx(llama_mean_and_uncertainty(nll))
    assert summary.perplexity == pytest.approx(math.exp(nll.mean()))
    assert summary.perplexity_stderr == pytest.approx(summary.perplexity * summary.nll_stderr)
    wanted = llama_mean_and_uncertainty(kld)
    assert (summary.kld.mean, summary.kld.mean_stderr) == pytest.approx(wanted)
    share = scores.same_top.double().mean().item()
    assert summary.kld.same_top == pytest.approx(share)
    assert summary.kld.same_top_stderr == pytest.approx(math.sqrt(share * (1 - share) / 1000))


def test_probability_differences_are_those_of_llama_perplexity(scores):
    summary = summarize(scores).kld
    dp = np.exp(-scores.nll.double().numpy()) - np.exp(-scores.reference_nll.double().numpy())
    mean, error = llama_mean_and_uncertainty(dp**2)
    assert summary.rms_dp == pytest.approx(math.sqrt(mean))
    assert summary.rms_dp_stderr == pytest.approx(0.5 / math.sqrt(mean) * error)


def test_percentiles_interpolate_linearly(scores):
    summary = summarize(scores).kld
    kld = scores.kld.numpy()
    got = [summary.median, summary.p90, summary.p95, summary.p99, summary.p999, summary.max]
    wanted = np.quantile(kld, [0.5, 0.9, 0.95, 0.99, 0.999, 1.0])
    assert got == pytest.approx(wanted.tolist(), rel=1e-4)


def test_median_of_an_even_number_is_the_mean_of_the_middle_two():
    assert percentile(torch.tensor([1.0, 2.0, 4.0, 9.0]), 0.5) == 3.0


def test_paired_error_is_that_of_the_perplexity_ratio(scores):
    a, b = scores.nll.double().numpy(), scores.reference_nll.double().numpy()
    n = len(a)
    error_a, error_b = llama_mean_and_uncertainty(a)[1], llama_mean_and_uncertainty(b)[1]
    covariance = ((a * b).sum() / n - a.mean() * b.mean()) / (n - 1)
    difference = mean_difference(scores.nll, scores.reference_nll)
    assert difference.value == pytest.approx(a.mean() - b.mean())
    wanted = math.sqrt(error_a**2 + error_b**2 - 2 * covariance)
    assert difference.stderr == pytest.approx(wanted)


def test_few_tokens_have_a_standard_error_above_zero():
    assert mean_of(torch.tensor([1.0, 2.0, 3.0])).stderr == pytest.approx(1 / math.sqrt(3))


def test_one_token_is_refused():
    with pytest.raises(DataError, match="at least 2"):
        mean_of(torch.ones(1))


def test_unequal_numbers_of_tokens_are_not_paired():
    with pytest.raises(DataError, match="cannot be paired"):
        mean_difference(torch.ones(3), torch.ones(4))


def test_without_a_reference_there_is_no_divergence():
    assert summarize(TokenScores(torch.ones(4))).kld is None


def test_a_broken_model_has_infinite_perplexity():
    assert summarize(TokenScores(torch.full((3,), 1000.0))).perplexity == math.inf


def test_the_perplexity_ratio_is_that_of_llama_perplexity(scores):
    against = summarize(scores).against
    nll, reference = scores.nll.double().numpy(), scores.reference_nll.double().numpy()
    mean, error = llama_mean_and_uncertainty(nll)
    reference_mean, reference_error = llama_mean_and_uncertainty(reference)
    covariance = (nll * reference).mean() - mean * reference_mean
    covariance /= len(nll) - 1
    ratio = math.exp(mean - reference_mean)
    variance = error**2 + reference_error**2 - 2 * covariance
    assert against.reference == pytest.approx(math.exp(reference_mean))
    assert against.reference_stderr == pytest.approx(math.exp(reference_mean) * reference_error)
    assert against.ratio == pytest.approx(ratio)
    assert against.ratio_stderr == pytest.approx(ratio * math.sqrt(variance))


def test_the_smallest_divergence_is_reported(scores):
    assert summarize(scores).kld.min == scores.kld.min().item()
