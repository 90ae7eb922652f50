"""Scores per token against log-softmax in float64."""

import pytest
import torch
from torch import Tensor

from qatlora.distill import LmHead
from qatlora.errors import ConfigError
from qatlora.evaluate import Reference, ScoreSettings, score_tokens

EXACT = ScoreSettings(chunk_tokens=5, chunk_words=16, compute_dtype=torch.float32)


class Pair:
    """A model and a reference of another width; tiles that divide neither tokens nor words."""

    def __init__(self, scale: float = 1.0):
        generator = torch.Generator().manual_seed(3)
        rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.hidden, self.other = rand(23, 24), rand(23, 40)
        self.head = LmHead(scale * rand(97, 24), rand(97), 9.0)
        self.other_head = LmHead(scale * rand(97, 40))
        self.targets = torch.randint(0, 97, (23,), generator=generator)

    def score(self, settings: ScoreSettings = EXACT):
        other = Reference(self.other, self.other_head)
        (scores,) = score_tokens(self.hidden, self.head, self.targets, [other], settings)
        return scores

    def log_probs(self) -> tuple[Tensor, Tensor]:
        raw = self.hidden.double() @ self.head.weight.double().T + self.head.bias
        other = self.other.double() @ self.other_head.weight.double().T
        return torch.log_softmax(9 * torch.tanh(raw / 9), -1), torch.log_softmax(other, -1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_scores_equal_the_float64_reference(scale):
    pair = Pair(scale)
    scores = pair.score()
    log_q, log_p = pair.log_probs()
    at = torch.arange(23), pair.targets
    close = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(scores.nll.double(), -log_q[at], **close)
    torch.testing.assert_close(scores.reference_nll.double(), -log_p[at], **close)
    kld = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(scores.kld.double(), kld, **close)
    assert torch.equal(scores.same_top, log_p.argmax(-1) == log_q.argmax(-1))


def test_the_likeliest_words_of_both_are_named():
    scores, (log_q, log_p) = Pair().score(), Pair().log_probs()
    assert torch.equal(scores.top, log_q.argmax(-1))
    assert torch.equal(scores.reference_top, log_p.argmax(-1))


def test_tile_sizes_change_rounding_only():
    pair = Pair()
    other = pair.score(
        ScoreSettings(chunk_tokens=100, chunk_words=100, compute_dtype=torch.float32)
    )
    torch.testing.assert_close(pair.score().kld, other.kld)
    assert torch.equal(pair.score().same_top, other.same_top)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_divergence_from_itself_is_exactly_zero(dtype):
    pair = Pair(10.0)
    settings = ScoreSettings(chunk_tokens=7, chunk_words=40, compute_dtype=dtype)
    itself = Reference(pair.hidden.clone(), pair.head)
    (scores,) = score_tokens(pair.hidden, pair.head, pair.targets, [itself], settings)
    assert scores.kld.abs().max() == 0
    assert scores.same_top.all()
    assert torch.equal(scores.nll, scores.reference_nll)


def test_nll_is_the_same_with_and_without_a_reference():
    pair = Pair()
    (alone,) = score_tokens(pair.hidden, pair.head, pair.targets, settings=EXACT)
    assert torch.equal(alone.nll, pair.score().nll)
    assert alone.kld is None


def test_equal_tops_go_to_the_first_word():
    head = LmHead(torch.zeros(50, 4))
    hidden, other = torch.ones(2, 4), LmHead(torch.zeros(50, 4), -torch.arange(50.0))
    settings = ScoreSettings(chunk_words=8, compute_dtype=torch.float32)
    (scores,) = score_tokens(
        hidden, head, torch.tensor([1, 49]), [Reference(hidden, other)], settings
    )
    assert scores.same_top.all()


def test_reference_of_another_vocabulary_is_refused():
    pair = Pair()
    other = Reference(pair.hidden, LmHead(torch.ones(96, 24)))
    with pytest.raises(ConfigError, match="96 words, the model 97"):
        score_tokens(pair.hidden, pair.head, pair.targets, [other], EXACT)
