"""TopWords against a slow float64 reference that merges the other words into one."""

import pytest
import torch
from torch import Tensor

from qatlora.distill import (
    Divergence,
    DivergenceKind,
    LmHead,
    LossSettings,
    TeacherStates,
    TopWords,
    chunked_loss,
    divergence_by_top_k,
    top_words,
)
from qatlora.errors import ConfigError

TOKENS, WORDS, WIDTH = 7, 61, 24
KINDS = [
    Divergence(),
    Divergence(temperature=2.0),
    Divergence(DivergenceKind.reverse_kl),
    Divergence(DivergenceKind.jsd, temperature=0.8, beta=0.3),
]


class Case:
    """A student and a teacher of another width, float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.hidden = rand(TOKENS, WIDTH)
        self.head = LmHead(0.4 * rand(WORDS, WIDTH), rand(WORDS), 30.0)
        self.teacher = TeacherStates(rand(TOKENS, 40), LmHead(0.4 * rand(WORDS, 40)))

    def known(self, top_k: int, temperature: float = 1.0) -> TopWords:
        return top_words(self.teacher.hidden, self.teacher.head, top_k, temperature)

    def loss(self, hidden: Tensor, teacher: TopWords | TeacherStates, divergence: Divergence):
        return chunked_loss(
            hidden,
            self.head,
            torch.zeros(TOKENS, dtype=torch.int64),
            teacher=teacher,
            divergence=divergence,
            token_ce_weight=torch.zeros(TOKENS),
            token_kl_weight=torch.ones(TOKENS),
            settings=LossSettings(3, torch.float64),
        )

    def student_logits(self, hidden: Tensor) -> Tensor:
        logits = hidden @ self.head.weight.T + self.head.bias
        return 30.0 * torch.tanh(logits / 30.0)


def merged(log_probs: Tensor, words: Tensor) -> Tensor:
    """Log-probabilities [T, k + 1] of the words and of all others together."""
    top = log_probs.gather(1, words)
    others = log_probs.scatter(1, words, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([top, others], 1)


def divergence_of(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """The textbook sums."""
    if divergence.kind is DivergenceKind.forward_kl:
        return (log_p.exp() * (log_p - log_q)).sum()
    if divergence.kind is DivergenceKind.reverse_kl:
        return (log_q.exp() * (log_q - log_p)).sum()
    beta = divergence.beta
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    parts = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    return parts.sum()


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_value_and_gradient_are_those_of_distributions_with_the_other_words_merged(divergence):
    case = Case()
    known = case.known(8, divergence.temperature)
    words = known.words.long()
    stored = torch.cat([known.log_probs, known.rest[:, None]], 1).double().log_softmax(1)
    wanted = case.hidden.clone().requires_grad_()
    log_q = torch.log_softmax(case.student_logits(wanted) / divergence.temperature, 1)
    total = divergence_of(stored, merged(log_q, words), divergence)
    total.backward()
    hidden = case.hidden.clone().requires_grad_()
    loss = case.loss(hidden, known, divergence)
    loss.total.backward()
    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(hidden.grad, wanted.grad)


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_gradient_passes_gradcheck(divergence):
    case = Case()
    known = case.known(5, divergence.temperature)
    hidden = case.hidden.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: case.loss(h, known, divergence).total, hidden)


def test_the_words_kept_are_the_likeliest_and_float16_holds_their_probabilities():
    case = Case()
    known = case.known(9)
    logits = case.teacher.head.logits(case.teacher.hidden)
    wanted = torch.log_softmax(logits.double(), 1).topk(9)
    assert torch.equal(known.words.long(), wanted.indices)
    assert (known.log_probs.double().exp() - wanted.values.exp()).abs().max() < 2.5e-4
    assert (known.rest.double().exp() - (1 - wanted.values.exp().sum(1))).abs().max() < 2.5e-4


def test_fewer_words_are_those_that_would_have_been_kept():
    case = Case()
    fewer, wanted = case.known(20).truncated(6), case.known(6)
    assert torch.equal(fewer.words, wanted.words)
    assert torch.equal(fewer.log_probs, wanted.log_probs)
    torch.testing.assert_close(fewer.rest, wanted.rest)  # rounded twice


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_more_words_keep_more_of_the_divergence_and_all_but_one_keep_it_all(divergence):
    case = Case()
    student = TeacherStates(case.hidden, case.head)
    top_ks = (1, 4, 16, WORDS - 1)
    full, kept = divergence_by_top_k(student, case.teacher, top_ks, divergence)
    values = [each.kept for each in kept]
    assert values == sorted(values)
    assert abs(full - values[-1]) < 1e-3 * full
    assert values[0] < 0.9 * full
    masses = [each.rest_mass for each in kept]
    assert masses == sorted(masses, reverse=True)
    assert full == pytest.approx(
        case.loss(case.hidden, case.teacher, divergence).total.item(), rel=1e-2
    )  # products in bf16


def test_a_student_equal_to_the_teacher_has_almost_no_divergence():
    case = Case()
    known = top_words(case.hidden, case.head, 8, 1.0)
    assert abs(case.loss(case.hidden, known, Divergence()).total.item()) < 1e-4 * TOKENS


def test_another_temperature_is_refused():
    case = Case()
    with pytest.raises(ConfigError, match=r"temperature=2\.0.* kept at 1\.0"):
        case.loss(case.hidden, case.known(8), Divergence(temperature=2.0))
