"""Divergences between the word probabilities of a teacher p and a student q, with gradients.

All take natural-log probabilities at the same temperature and are true divergences in nats: the
teacher's entropy is part of the forward KL, so identical inputs give exactly 0.

Shapes: N tokens, V words. A call sees a block of a few rows that fits a CPU cache, because on a
vocabulary of 262,144 words the number of passes over main memory decides the speed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlora.config import DivergenceKind
from qatlora.errors import ConfigError


@dataclass(frozen=True)
class Divergence:
    """A divergence and its parameters.

    Attributes:
        kind: forward_kl, reverse_kl or jsd.
        temperature: both distributions are softmax(logits / temperature). The value is NOT
            multiplied by temperature ** 2 (Hinton's factor, arXiv:1503.02531 section 2): put it
            into the token weights if the gradient's size is to be kept.
        beta: the teacher's share of the mixture, in (0, 1); for jsd (GKD, arXiv:2306.13649, eq. 1).
    """

    kind: DivergenceKind = DivergenceKind.forward_kl
    temperature: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        """Refuse parameters without a meaning."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(
                f"temperature={self.temperature}: must be a positive number; 1 leaves the "
                "probabilities as they are."
            )
        if self.kind is DivergenceKind.jsd and not 0 < self.beta < 1:
            raise ConfigError(
                f"beta={self.beta}: the teacher's share of the mixture must be between 0 and 1. "
                "For the limits use forward_kl or reverse_kl."
            )

    def value_and_pull(
        self, log_p: Tensor, log_q: Tensor, q: Tensor, p: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the divergence of each row and its gradient.

        Args:
            log_p: [N, V] teacher's log-probabilities. Overwritten.
            log_q: [N, V] student's log-probabilities, finite like the teacher's.
            q: [N, V] exp(log_q).
            p: [N, V] scratch memory. Overwritten.

        Returns:
            (value [N] in nats, pull [N, V]): pull is the gradient by (logits / temperature) and
            lies in the memory of `log_p` or `p`.
        """
        return _KERNELS[self.kind](log_p, log_q, q, p, self.beta)


def _forward_kl(
    log_p: Tensor, log_q: Tensor, q: Tensor, p: Tensor, _: float
) -> tuple[Tensor, Tensor]:
    torch.exp(log_p, out=p)
    value = log_p.sub_(log_q).mul_(p).sum(dim=1)
    return value, torch.sub(q, p, out=p)


def _reverse_kl(
    log_p: Tensor, log_q: Tensor, q: Tensor, p: Tensor, _: float
) -> tuple[Tensor, Tensor]:
    ratio = torch.sub(log_q, log_p, out=log_p)
    value = torch.mul(ratio, q, out=p).sum(dim=1)
    return value, torch.addcmul(p, q, value.unsqueeze(1), value=-1, out=p)


def _jsd(log_p: Tensor, log_q: Tensor, q: Tensor, p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    # Ratios of probabilities, not differences of logarithms: lerp is exact where p == q, so a
    # ratio is exactly 1 there. The smallest normal number keeps 0 / 0 out.
    tiny = torch.finfo(q.dtype).tiny
    torch.exp(log_p, out=p)
    mixture = torch.lerp(q, p, beta, out=log_p).clamp_(min=tiny)
    p.clamp_(min=tiny)
    teacher_part = torch.div(p, mixture).log_().mul_(p).sum(dim=1)
    ratio = torch.clamp(q, min=tiny, out=p).div_(mixture).log_()
    student_part = torch.mul(ratio, q, out=log_p).sum(dim=1)
    value = beta * teacher_part + (1 - beta) * student_part
    pull = torch.addcmul(log_p, q, student_part.unsqueeze(1), value=-1, out=log_p)
    return value, pull.mul_(1 - beta)


_Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
_KERNELS: dict[DivergenceKind, _Kernel] = {
    DivergenceKind.forward_kl: _forward_kl,
    DivergenceKind.reverse_kl: _reverse_kl,
    DivergenceKind.jsd: _jsd,
}
