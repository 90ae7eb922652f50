"""Cross-entropy and divergence over a frozen head, without the logits of a batch.

The logits of 2,048 tokens over 262,144 words are 1 GiB in bf16, and a usual loss holds several
such tensors in fp32. Here the tokens are taken in chunks: logits of a chunk by one product, then a
few rows at a time (a block that fits the CPU's cache) probabilities, both losses and the gradient
of the logits, which overwrites the logits; one more product turns it into the gradient of the
hidden states. Nothing else is kept: the gradient is finished in the forward, possible because the
head is frozen and the loss is a scalar. Liger's fused linear cross-entropy (arXiv:2410.10989) works
the same way; this one adds the teacher, the softcap and weights per token.

Shapes: T tokens, S selected tokens, C tokens of a chunk, R rows of a block, H hidden size, V words.
Arithmetic: products in `compute_dtype`, everything between them in float32 (float64 for float64).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qatlora.distill.blocks import row_blocks
from qatlora.distill.divergence import Divergence
from qatlora.distill.head import LmHead
from qatlora.distill.teachers import Teacher, TeacherReader
from qatlora.errors import ConfigError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class LossSettings:
    """How a loss is computed; the result depends on it by rounding only.

    Attributes:
        chunk_tokens: tokens whose logits exist at a time. Memory: chunk_tokens * V * 2 bytes for
            the student and as much for the teacher (bf16).
        compute_dtype: of the products: bfloat16, float32 or float64.
    """

    chunk_tokens: int = 128
    compute_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        """Refuse what the products cannot do."""
        if self.chunk_tokens < 1:
            raise ConfigError(
                f"chunk_tokens={self.chunk_tokens}: must be at least 1; 128 is usual."
            )
        if self.compute_dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ConfigError(
                f"compute_dtype={self.compute_dtype}: gradients of logits need the range of "
                "float32. Use bfloat16 or float32."
            )


@dataclass(frozen=True)
class ChunkedLoss:
    """Sums over tokens; nothing is divided here, so parts of a batch add up.

    Attributes:
        total: scalar, float32 or float64, differentiable with respect to the hidden states:
            sum(token_ce_weight * ce) + sum(token_kl_weight * divergence).
        ce_sum: unweighted sum of cross-entropies, in nats, over the `ce_count` scored tokens.
        ce_count: tokens with a label and a cross-entropy weight > 0.
        kl_sum: unweighted sum of divergences, in nats, over `kl_count` tokens.
        kl_count: tokens with a divergence weight > 0.
        token_ce: [T] cross-entropies, detached, 0 where the weight is 0.
        token_kl: [T] divergences, likewise.
    """

    total: Tensor
    ce_sum: Tensor
    ce_count: int
    kl_sum: Tensor
    kl_count: int
    token_ce: Tensor
    token_kl: Tensor


def chunked_loss(
    hidden: Tensor,
    head: LmHead,
    labels: Tensor,
    *,
    teacher: Teacher | None,
    divergence: Divergence,
    token_ce_weight: Tensor,
    token_kl_weight: Tensor,
    settings: LossSettings,
) -> ChunkedLoss:
    """Weighted cross-entropy plus weighted divergence from a teacher, summed over tokens.

    Tokens whose weights are both 0 cost nothing. The value does not depend on how a batch is split
    over calls: the weights carry any 1/N.

    Args:
        hidden: [T, H] final hidden states, any float dtype; the gradient reaches these only.
        head: frozen student head. A weight not in `compute_dtype` is converted in every call: keep
            a `head.to(dtype)` where memory allows.
        labels: [T] int64, already shifted: the word that follows; -100 for no cross-entropy.
        teacher: probabilities for the same T tokens; None if no weight asks for them.
        divergence: kind, temperature, beta.
        token_ce_weight: [T] float32, >= 0.
        token_kl_weight: [T] float32, >= 0.
        settings: chunk size and compute dtype.

    Raises:
        ConfigError: divergence weights without a teacher, or a teacher of another vocabulary.
    """
    wants_gradient = hidden.requires_grad and torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        work = _Pass(hidden, head, labels, teacher, divergence, settings, wants_gradient)
        work.weigh(token_ce_weight, token_kl_weight)
        work.run()
        # Summed in float64, so that the order of chunks and batches does not show.
        ce, kl = work.ce.double(), work.kl.double()
        total = torch.sum(ce * work.ce_weight.double()) + torch.sum(kl * work.kl_weight.double())
        total = total.to(work.dtype)
    if work.grad_hidden is not None:
        total = _KnownGradient.apply(hidden, total, work.grad_hidden)  # type: ignore[no-untyped-call]
    return ChunkedLoss(total, ce.sum(), work.ce_count, kl.sum(), work.kl_count, ce, kl)


class _KnownGradient(torch.autograd.Function):
    """Gives a finished scalar the gradient that was computed along with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, total: Tensor, grad_hidden: Tensor) -> Tensor:
        ctx.save_for_backward(grad_hidden)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "chunked_loss has no second derivative: its gradient is computed in the forward "
                "and kept as a constant. Call backward without create_graph=True."
            )
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_total.to(grad_hidden.dtype), None, None


@dataclass(frozen=True)
class _Group:
    """Tokens [S] that need the same work."""

    tokens: Tensor
    with_ce: bool
    with_kl: bool


class _Pass:
    """One call of `chunked_loss`: its inputs, and per-token results that fill up chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,
        head: LmHead,
        labels: Tensor,
        teacher: Teacher | None,
        divergence: Divergence,
        settings: LossSettings,
        wants_gradient: bool,
    ):
        self.hidden, self.labels, self.teacher = hidden, labels, teacher
        self.divergence, self.settings = divergence, settings
        self.head = head.to(settings.compute_dtype)
        is_double = settings.compute_dtype == torch.float64
        self.dtype = torch.float64 if is_double else torch.float32
        self.ce = hidden.new_zeros(hidden.shape[0], dtype=self.dtype)
        self.kl = torch.zeros_like(self.ce)
        self.grad_hidden = torch.zeros_like(hidden) if wants_gradient else None

    def weigh(self, ce_weight: Tensor, kl_weight: Tensor) -> None:
        """Keep the weights of tokens that count, and split the tokens by the work they need."""
        has_ce = (ce_weight > 0) & (self.labels != IGNORED_LABEL)
        has_kl = kl_weight > 0
        self.ce_weight = ce_weight.to(self.dtype) * has_ce
        self.kl_weight = kl_weight.to(self.dtype) * has_kl
        both, only_ce, only_kl = has_ce & has_kl, has_ce & ~has_kl, has_kl & ~has_ce
        groups = [
            _Group(both.nonzero().squeeze(1), with_ce=True, with_kl=True),
            _Group(only_ce.nonzero().squeeze(1), with_ce=True, with_kl=False),
            _Group(only_kl.nonzero().squeeze(1), with_ce=False, with_kl=True),
        ]
        self.groups = [group for group in groups if len(group.tokens)]
        self.ce_count = sum(len(group.tokens) for group in groups if group.with_ce)
        self.kl_count = sum(len(group.tokens) for group in groups if group.with_kl)

    def run(self) -> None:
        """Fill the results; one buffer of logits serves all chunks."""
        reader = self._open_teacher()
        size = self.settings.chunk_tokens
        most = min(size, max((len(group.tokens) for group in self.groups), default=0))
        buffer = self.head.weight.new_empty(most, self.head.vocab_size)
        for group in self.groups:
            for tokens in torch.split(group.tokens, size):
                self._chunk(tokens, group, buffer[: len(tokens)], reader)

    def _open_teacher(self) -> TeacherReader | None:
        if self.kl_count == 0:
            return None
        if self.teacher is None:
            raise ConfigError(
                f"{self.kl_count} tokens have a divergence weight above 0, but there is no "
                "teacher. Configure a teacher or set the weight of the divergence to 0."
            )
        if self.teacher.vocab_size != self.head.vocab_size:
            raise ConfigError(
                f"The teacher has {self.teacher.vocab_size} words, the student "
                f"{self.head.vocab_size}: their probabilities cannot be compared. Use a teacher "
                "with the student's tokenizer and the same padding of the vocabulary."
            )
        most = min(self.settings.chunk_tokens, self.kl_count)
        return self.teacher.reader(most, self.settings.compute_dtype)

    def _chunk(
        self, tokens: Tensor, group: _Group, logits: Tensor, reader: TeacherReader | None
    ) -> None:
        """Logits [C, V] of a chunk, block by block replaced by their gradient, and its product."""
        hidden = self.hidden[tokens].to(logits.dtype)
        torch.mm(hidden, self.head.weight.t(), out=logits)
        if group.with_kl and reader is not None:
            reader.load(tokens)
        for rows in row_blocks(logits):
            logits[rows] = self._block(tokens[rows], rows, group, logits[rows], reader)
        if self.grad_hidden is not None:
            gradient = torch.mm(logits, self.head.weight)
            self.grad_hidden[tokens] = gradient.to(self.grad_hidden.dtype)

    def _block(
        self,
        tokens: Tensor,
        rows: slice,
        group: _Group,
        raw: Tensor,
        reader: TeacherReader | None,
    ) -> Tensor:
        """Score rows [R, V] of raw logits; return the gradient of the total by them."""
        capped = self.head.finish_(raw.to(self.dtype, copy=True))
        temperature = self.divergence.temperature
        gradient = log_q = q = None
        if group.with_kl and reader is not None:
            log_q = _log_softmax(capped, temperature)
            q = log_q.exp()
            log_p = reader.log_probs(rows, temperature, log_q)
            value, pull = self.divergence.value_and_pull(log_p, log_q, q, torch.empty_like(q))
            self.kl[tokens] = value
            gradient = pull.mul_(self.kl_weight[tokens, None] / temperature)
        if group.with_ce:
            if log_q is None or q is None or temperature != 1:
                log_q = _log_softmax(capped, 1.0)
                q = log_q.exp()
            weight, words = self.ce_weight[tokens, None], self.labels[tokens, None]
            self.ce[tokens] = -log_q.gather(1, words).squeeze(1)
            gradient = q.mul_(weight) if gradient is None else gradient.addcmul_(q, weight)
            gradient.scatter_add_(1, words, -weight)
        assert gradient is not None, "a group has at least one loss"
        return self._through_softcap(gradient, capped)

    def _through_softcap(self, gradient: Tensor, capped: Tensor) -> Tensor:
        """Multiply by d(capped) / d(raw) = 1 - (capped / softcap) ** 2, in place."""
        if self.head.softcap is None:
            return gradient
        slope = capped.div_(self.head.softcap).square_().neg_().add_(1)
        return gradient.mul_(slope)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=1)
