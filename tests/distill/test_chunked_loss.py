"""chunked_loss against a slow float64 reference that holds all logits."""

import itertools

import pytest
import torch
from torch import Tensor

from qatlora.distill import (
    Divergence,
    DivergenceKind,
    LmHead,
    LossSettings,
    TeacherStates,
    chunked_loss,
)
from qatlora.errors import ConfigError

EXACT = LossSettings(chunk_tokens=4, compute_dtype=torch.float64)
FORWARD = Divergence()


def reference_logits(hidden: Tensor, head: LmHead) -> Tensor:
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def reference_divergence(p_logits: Tensor, q_logits: Tensor, divergence: Divergence) -> Tensor:
    """The textbook sums, one value per token."""
    log_p = torch.log_softmax(p_logits / divergence.temperature, -1)
    log_q = torch.log_softmax(q_logits / divergence.temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    if divergence.kind is DivergenceKind.forward_kl:
        return (p * (log_p - log_q)).sum(-1)
    if divergence.kind is DivergenceKind.reverse_kl:
        return (q * (log_q - log_p)).sum(-1)
    beta = divergence.beta
    log_m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


class Case:
    """A student, a teacher of another width, labels and weights, with zeros among them."""

    def __init__(self, tokens: int = 13, words: int = 97, softcap: float | None = None):
        generator = torch.Generator().manual_seed(tokens * words)
        rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.hidden = rand(tokens, 24)
        self.head = LmHead(rand(words, 24), rand(words), softcap)
        self.teacher = TeacherStates(rand(tokens, 40), LmHead(0.6 * rand(words, 40), None, 20.0))
        self.labels = torch.randint(0, words, (tokens,), generator=generator)
        self.labels[1] = -100
        self.ce_weight = torch.rand(tokens, generator=generator)
        self.kl_weight = torch.rand(tokens, generator=generator)
        self.ce_weight[[0, 3, 5]] = 0
        self.kl_weight[[0, 2, 5]] = 0

    def loss(self, hidden: Tensor, divergence: Divergence = FORWARD, settings=EXACT, **changes):
        given = {
            "teacher": self.teacher,
            "divergence": divergence,
            "token_ce_weight": self.ce_weight,
            "token_kl_weight": self.kl_weight,
            "settings": settings,
        }
        return chunked_loss(hidden, self.head, self.labels, **(given | changes))

    def expected(self, hidden: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
        """Total, cross-entropies and divergences per token."""
        logits = reference_logits(hidden, self.head)
        ce = torch.nn.functional.cross_entropy(
            logits, self.labels, reduction="none", ignore_index=-100
        )
        teacher = reference_logits(self.teacher.hidden, self.teacher.head)
        kl = reference_divergence(teacher, logits, divergence)
        return (self.ce_weight * ce).sum() + (self.kl_weight * kl).sum(), ce, kl


KINDS = [
    FORWARD,
    Divergence(temperature=2.5),
    Divergence(DivergenceKind.reverse_kl),
    Divergence(DivergenceKind.reverse_kl, temperature=0.7),
    Divergence(DivergenceKind.jsd, beta=0.3),
    Divergence(DivergenceKind.jsd, temperature=2.0, beta=0.9),
]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_value_and_gradient_equal_the_float64_reference(divergence, softcap):
    case = Case(softcap=softcap)
    hidden = case.hidden.clone().requires_grad_()
    loss = case.loss(hidden, divergence)
    (3 * loss.total).backward()
    wanted = case.hidden.clone().requires_grad_()
    total, ce, kl = case.expected(wanted, divergence)
    (3 * total).backward()
    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(hidden.grad, wanted.grad)
    scored = (case.ce_weight > 0) & (case.labels != -100)
    torch.testing.assert_close(loss.ce_sum, ce[scored].sum())
    torch.testing.assert_close(loss.kl_sum, kl[case.kl_weight > 0].sum())
    assert (loss.ce_count, loss.kl_count) == (int(scored.sum()), int((case.kl_weight > 0).sum()))


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_gradient_passes_gradcheck(divergence):
    case = Case(tokens=6, words=11, softcap=4.0)
    hidden = case.hidden.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: case.loss(h, divergence).total, hidden)


@pytest.mark.parametrize("divergence", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_identical_teacher_gives_exactly_zero(divergence, dtype):
    case = Case(tokens=9, words=1001)
    head = LmHead(10 * case.head.weight, case.head.bias, 30.0)  # sharp: words underflow
    hidden = case.hidden.float().requires_grad_()
    loss = chunked_loss(
        hidden,
        head,
        case.labels,
        teacher=TeacherStates(case.hidden.float(), head),
        divergence=divergence,
        token_ce_weight=torch.zeros(9),
        token_kl_weight=torch.ones(9),
        settings=LossSettings(4, dtype),
    )
    loss.total.backward()
    assert loss.total.item() == 0
    assert loss.kl_sum.item() == 0
    assert hidden.grad.abs().max() < 1e-6


def test_tokens_without_weight_are_never_multiplied(monkeypatch):
    case = Case()
    rows = []
    multiply = torch.mm

    def counting(left, right, **keywords):
        rows.append(left.shape[0])
        return multiply(left, right, **keywords)

    monkeypatch.setattr(torch, "mm", counting)
    with torch.no_grad():
        case.loss(case.hidden)
    has_ce = (case.ce_weight > 0) & (case.labels != -100)
    has_kl = case.kl_weight > 0
    assert sum(rows) == int((has_ce | has_kl).sum()) + int(has_kl.sum())


def test_values_of_tokens_without_weight_do_not_matter():
    case = Case()
    hidden = case.hidden.clone()
    hidden[[0, 5]] = float("nan")
    hidden.requires_grad_()
    loss = case.loss(hidden)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert torch.equal(hidden.grad[[0, 5]], torch.zeros(2, 24, dtype=torch.float64))


def test_nothing_to_score_gives_zero_with_a_gradient():
    case = Case()
    hidden = case.hidden.clone().requires_grad_()
    none = torch.zeros(13)
    loss = case.loss(hidden, token_ce_weight=none, token_kl_weight=none, teacher=None)
    loss.total.backward()
    assert loss.total.item() == 0
    assert (loss.ce_count, loss.kl_count) == (0, 0)
    assert hidden.grad.abs().max() == 0


@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
def test_chunk_size_changes_rounding_only(chunk_tokens):
    case = Case(softcap=5.0)
    wanted = case.loss(case.hidden).total
    settings = LossSettings(chunk_tokens, torch.float64)
    torch.testing.assert_close(case.loss(case.hidden, settings=settings).total, wanted)


def test_value_and_gradient_do_not_depend_on_how_a_batch_is_split():
    case = Case()
    whole = case.hidden.clone().requires_grad_()
    case.loss(whole).total.backward()
    parts = case.hidden.clone().requires_grad_()
    totals, ce_count = [], 0
    for start, stop in itertools.pairwise([0, 2, 9, 13]):
        part = slice(start, stop)
        teacher = TeacherStates(case.teacher.hidden[part], case.teacher.head)
        loss = chunked_loss(
            parts[part],
            case.head,
            case.labels[part],
            teacher=teacher,
            divergence=FORWARD,
            token_ce_weight=case.ce_weight[part],
            token_kl_weight=case.kl_weight[part],
            settings=EXACT,
        )
        loss.total.backward()
        totals.append(loss.total.detach())
        ce_count += loss.ce_count
    torch.testing.assert_close(sum(totals), case.loss(case.hidden).total)
    torch.testing.assert_close(parts.grad, whole.grad)
    assert ce_count == case.loss(case.hidden).ce_count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision_stays_near_the_reference(dtype):
    case = Case(tokens=40, words=1001, softcap=30.0)
    hidden = case.hidden.to(dtype).requires_grad_()
    loss = case.loss(hidden, settings=LossSettings(16, dtype))
    loss.total.backward()
    wanted = case.hidden.clone().requires_grad_()
    total, _, _ = case.expected(wanted, FORWARD)
    total.backward()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert (loss.total.dtype, hidden.grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.total.double(), total, rtol=tolerance, atol=0)
    error = (hidden.grad.double() - wanted.grad).norm() / wanted.grad.norm()
    assert error < tolerance


def test_autocast_around_the_call_changes_nothing():
    case = Case()
    hidden = case.hidden.float().requires_grad_()
    settings = LossSettings(4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.loss(hidden, settings=settings).total
    assert torch.equal(inside, case.loss(hidden, settings=settings).total)


def test_no_gradient_is_computed_where_none_is_wanted():
    case = Case()
    hidden = case.hidden.clone().requires_grad_()
    with torch.no_grad():
        assert not case.loss(hidden).total.requires_grad
    assert not case.loss(case.hidden).total.requires_grad


def test_second_derivative_is_refused():
    case = Case()
    hidden = case.hidden.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(case.loss(hidden).total, hidden, create_graph=True)


def test_divergence_without_a_teacher_is_refused():
    case = Case()
    with pytest.raises(ConfigError, match="no teacher"):
        case.loss(case.hidden, teacher=None)


def test_teacher_of_another_vocabulary_is_refused():
    case = Case()
    teacher = TeacherStates(case.teacher.hidden, LmHead(torch.ones(96, 40)))
    with pytest.raises(ConfigError, match="96 words, the student 97"):
        case.loss(case.hidden, teacher=teacher)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Divergence(temperature=0.0),
        lambda: Divergence(DivergenceKind.jsd, beta=1.0),
        lambda: LossSettings(chunk_tokens=0),
        lambda: LossSettings(compute_dtype=torch.float16),
    ],
)
def test_meaningless_settings_are_refused(make):
    with pytest.raises(ConfigError):
        make()
