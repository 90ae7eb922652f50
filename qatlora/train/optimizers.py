"""AdamW for adapters, and for whole weights that may be bf16 or have moments of 8 bits.

A step of AdamW moves a weight by about the learning rate, 1e-5 to 1e-4, and bf16 numbers around 0.1
lie 5e-4 apart: rounded to the nearest one, the weight would never move. `RoundedAdamW` rounds up
or down at random, with the nearer one the likelier, so that the expected weight is the float32 one:

    w' = round_down(|w| + gap * u),  u uniform in [0, 1)        (gap: of bf16 at w)

The random bits come from (seed, step, place of the parameter) alone, so that a resumed run draws
what the uninterrupted one does, and all processes of torchrun draw alike.

Sources: Gupta et al., "Deep Learning with Limited Numerical Precision", 2015, for the rounding;
Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021, for the moments.
"""

from typing import Any

import numpy
import torch
from bitsandbytes.optim import AdamW
from torch import Tensor, nn

from qatlora.adapters.model import ParameterGroups
from qatlora.config import Optimizer, TrainConfig

_FUSED_FROM = 1 << 24
_DROPPED_BITS = 16  # of a float32 that becomes a bf16


def build_optimizer(
    parameters: ParameterGroups, settings: TrainConfig, seed: int
) -> torch.optim.Optimizer:
    """AdamW with a learning rate for the levels and one for the steps.

    Args:
        parameters: float32, or bf16, which is rounded.
        settings: rates, weight decay, and how the moments are held.
        seed: of the rounding.
    """
    levels, steps = parameters.levels, parameters.steps
    rate = settings.learning_rate * parameters.level_size
    rated = ((levels, rate), (steps, settings.rate_of_steps))
    groups = [{"params": group, "lr": rate} for group, rate in rated if group]
    is_wide = all(one.dtype == torch.float32 for one in (*levels, *steps))
    if settings.optimizer is Optimizer.adamw and is_wide:
        num_trained = sum(one.numel() for one in (*levels, *steps))
        return torch.optim.AdamW(
            groups,
            weight_decay=settings.weight_decay,
            # One pass over parameter, gradient and moments: it matters where these are weights.
            fused=True if num_trained > _FUSED_FROM else None,
        )
    bits = 8 if settings.optimizer is Optimizer.adamw_8bit else 32
    return RoundedAdamW(groups, seed, weight_decay=settings.weight_decay, optim_bits=bits)


class RoundedAdamW(AdamW):
    """bitsandbytes' AdamW, whose parameters in bf16 are computed in float32, one after the other.

    Moments are float32 or, with `optim_bits=8`, 8 bits and a float32 scale per 256.
    """

    def __init__(self, groups: list[dict[str, Any]], seed: int, **options: Any) -> None:
        super().__init__(groups, **options)
        self._seed = seed
        # In the first step they would come between temporaries and leave holes in a CPU's heap.
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                self.init_state(group, p, gindex, pindex)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Update one parameter and its moments; the names are bitsandbytes' own."""
        if p.dtype == torch.float32:
            super().update_step(group, p, gindex, pindex)
            return
        wide = nn.Parameter(p.float())
        wide.grad = p.grad.float()
        self.state[wide] = self.state[p]  # lent for this update
        super().update_step(group, wide, gindex, pindex)
        del self.state[wide]
        key = (self._seed, self.state[p]["step"], gindex, pindex)
        p.copy_(round_stochastically(wide.data, _generator(key, p.device)))


def round_stochastically(wide: Tensor, generator: torch.Generator) -> Tensor:
    """Round finite float32 to bf16 neighbours, in expectation to itself.

    Returns:
        bf16 of the same shape; a value that bf16 has stays.
    """
    noise = torch.randint(
        1 << _DROPPED_BITS,
        wide.shape,
        generator=generator,
        dtype=torch.int32,
        device=wide.device,
    )
    # A float's lower bits are those of its magnitude, whatever its sign.
    bits = noise.add_(wide.view(torch.int32)).bitwise_and_(-1 << _DROPPED_BITS)
    return bits.view(torch.float32).bfloat16()


def _generator(key: tuple[int, ...], device: torch.device) -> torch.Generator:
    """A generator of its own for a key of whole numbers."""
    state = numpy.random.SeedSequence(key).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))
