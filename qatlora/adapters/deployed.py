"""The one function that defines a deployed weight, and the rule it follows.

A deployed weight is ``step * level``. An adapter of kind

    lora    moves the levels:  level = clamp(round(t0 + u + scale * (B A) / step), -8, 7)
    steps   moves the steps:   step' = fp16(step * (1 + scale_s * (B_s A_s)))
    both    moves the levels by the base's steps, then the steps

Without an adapter the weights themselves may be trained, as latents w over frozen base
steps (`LatentRule`): level = clamp(round(w / step), -8, 7), and the steps stay, move by a factor of
their own, or are chosen anew with the levels by llama.cpp's rule.

Above, t0 are the base's latent levels and u is the dither: 0 where t0 keeps a fraction, and on a
grid a fixed value in (-1/2, 1/2), so that the *expected* change of a level is the delta and there
is no dead zone, while a zero delta moves nothing (`qatlora.grid.dither`).

Shapes: x [tokens, in], W [out, in], A [r, in], B [out, r], A_s [r_s, in/32], B_s [out, r_s]. A
stack of experts has such factors for each of its matrices, and is deployed matrix by matrix.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from qatlora.base.experts import Stacked, stacked
from qatlora.base.linear import GridLinear
from qatlora.base.stores import LatentReader, reciprocal
from qatlora.grid import (
    BLOCK_SIZE,
    Dither,
    Q4Blocks,
    add_dither_,
    decode,
    encode_reference,
    fused,
    nearest_levels_,
)

if TYPE_CHECKING:
    from qatlora.adapters.expert_layer import ExpertAdapter
    from qatlora.adapters.latent_layer import LatentLinear
    from qatlora.adapters.layer import GridAdapter

    MatrixAdapter: TypeAlias = GridAdapter | ExpertAdapter
    Layer: TypeAlias = GridLinear | Stacked | MatrixAdapter | LatentLinear

_FP16_MAX = 65504.0


@dataclass(frozen=True)
class AdapterRule:
    """Everything besides the parameters that decides which blocks an adapter deploys.

    Attributes:
        kind: lora, steps or both.
        rank: rank of the level delta B A.
        alpha: its scale is alpha / rank.
        steps_rank: rank of the step factor B_s A_s; its scale is 1.
        rounding: frozen (the base's steps stay) or reference (llama.cpp's rule on base + delta).
        dither: auto (where the base lies on a grid), always or never.
        seed: seed of the dither.
    """

    kind: str
    rank: int
    alpha: float
    steps_rank: int
    rounding: str
    dither: str
    seed: int

    @property
    def moves_levels(self) -> bool:
        """True for lora and both."""
        return self.kind in ("lora", "both")

    @property
    def moves_steps(self) -> bool:
        """True for steps and both."""
        return self.kind in ("steps", "both")

    def dithers(self, on_grid: bool) -> bool:
        """Whether levels are rounded with the dither, over a base that lies on a grid or not."""
        rounds = self.moves_levels and self.rounding == "frozen"
        return rounds and (self.dither == "always" or (self.dither == "auto" and on_grid))

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LatentRule:
    """How latent weights become blocks.

    Attributes:
        steps: frozen (found once in the checkpoint's weights), recomputed (llama.cpp's rule on the
            latents) or learned (the frozen steps times a trained factor per block).
    """

    steps: str


@torch.no_grad()
def deployed_weight(layer: "Layer") -> Q4Blocks:
    """The model: what training multiplies by, the guard compares and the GGUF holds.

    Args:
        layer: a base layer, an adapter over one (with disabled adapters: the base), latents, or
            one expert of a stack.

    Returns:
        steps float16 [out, in / 32] and levels int8 [out, in]; of a stack [E, ...].
    """
    if isinstance(layer, GridLinear):
        return layer.base_blocks()
    if isinstance(layer, Stacked):
        return stacked(deployed_weight(expert) for expert in layer.linears())
    if isinstance(layer.rule, LatentRule):
        return _of_latents(layer)
    # Autocast would round the delta to bf16 and move codes.
    with torch.autocast(layer.get_base_layer().store.steps.device.type, enabled=False):
        blocks = _with_moved_levels(layer)
        return Q4Blocks(moved_steps(layer, blocks.steps), blocks.levels)


def _of_latents(layer: "LatentLinear") -> Q4Blocks:
    if layer.is_off:
        return layer.get_base_layer().base_blocks()
    if layer.settled is not None:
        return layer.settled
    if layer.rule.steps == "recomputed":
        return encode_reference(layer.latent.float())
    # A product with the reciprocal, not a quotient: eight times faster, and a decoded level still
    # comes back, because half a level is far more than a rounding.
    per_step = reciprocal(layer.steps).unsqueeze(-1)
    latents = (layer.latent.unflatten(-1, (-1, BLOCK_SIZE)) * per_step).flatten(-2)
    levels = nearest_levels_(latents).to(torch.int8)
    if layer.step_change is None:
        return Q4Blocks(layer.steps, levels)
    return Q4Blocks(changed_steps(layer.steps, layer.step_change), levels)


def _with_moved_levels(layer: "MatrixAdapter") -> Q4Blocks:
    base = layer.get_base_layer()
    down, up = layer.parameters_of("lora_A"), layer.parameters_of("lora_B")
    if down is None or up is None:
        return base.base_blocks()
    if layer.rule.rounding == "reference":
        return _merged_by_reference(base, layer.rule, down, up)
    return _moved_levels(base, layer.rule, down, up)


def _moved_levels(base: GridLinear, rule: AdapterRule, down: Tensor, up: Tensor) -> Q4Blocks:
    """Frozen steps: round the base's latents plus dither plus the delta measured in steps."""
    store, num_rows, width = base.store, len(up), down.shape[-1]
    product, per_step = LowRank(up, down, rule.scale), reciprocal(store.steps)
    by_row = by_column = None
    if rule.dithers(store.on_grid):
        noise = Dither(rule.seed, base.tensor_name)
        rows_of_tensor = slice(base.first_row, base.first_row + num_rows)
        by_row, by_column = noise.ramps(rows_of_tensor, width, up.device)
    levels = torch.empty(num_rows, width, dtype=torch.int8, device=up.device)
    for rows, stored in store.stored_tiles():
        parts = (store.steps[rows], product.of_rows(rows), per_step[rows])
        ramp = None if by_row is None else by_row[rows]
        _fill_moved(levels[rows], store.read, stored, *parts, ramp, by_column)
    return Q4Blocks(store.steps, levels)


def _deltas_near_ties(
    read: LatentReader, stored: Tensor, steps: Tensor, delta: Tensor, *others: Tensor | None
) -> tuple[object, ...]:
    """Deltas of some steps, every second one a multiple of half a step."""
    in_steps = 8 * torch.randn_like(delta)
    in_steps[:, ::2] = in_steps[:, ::2].mul_(2).round_().div_(2)
    wide_steps = steps.double().repeat_interleave(BLOCK_SIZE, dim=-1)
    return read, stored, steps, in_steps * wide_steps, *others


@fused(trial=_deltas_near_ties)
def _fill_moved(
    out: Tensor,
    read: LatentReader,
    stored: Tensor,
    steps: Tensor,
    delta: Tensor,
    per_step: Tensor,
    by_row: Tensor | None,
    by_column: Tensor | None,
) -> None:
    """Levels of some rows from what is stored of them, delta float64 and the dither's ramps."""
    in_steps = delta.float().unflatten(-1, (-1, BLOCK_SIZE)).mul_(per_step.unsqueeze(-1))
    moved = read(stored, steps).float().add_(in_steps.flatten(-2))
    if by_row is not None and by_column is not None:
        add_dither_(moved, by_row, by_column)
    out.copy_(nearest_levels_(moved))


def _merged_by_reference(base: GridLinear, rule: AdapterRule, down: Tensor, up: Tensor) -> Q4Blocks:
    """llama.cpp's rule on base + delta, in float32; it chooses new steps."""
    product, tiles = LowRank(up, down, rule.scale), []
    for rows, latents in base.store.latent_tiles():
        wide_steps = base.store.steps[rows].float().unsqueeze(-1)
        weight = latents.unflatten(-1, (-1, BLOCK_SIZE)).mul_(wide_steps).flatten(-2)
        tiles.append(encode_reference(weight.add_(product.of_rows(rows).float())))
    return Q4Blocks(
        torch.cat([tile.steps for tile in tiles]), torch.cat([tile.levels for tile in tiles])
    )


def moved_steps(layer: "MatrixAdapter", steps: Tensor) -> Tensor:
    """The steps after the step adapter, float16; unchanged where there is none."""
    down, up = layer.parameters_of("lora_steps_A"), layer.parameters_of("lora_steps_B")
    if down is None or up is None:
        return steps
    return changed_steps(steps, low_rank(up, down, 1.0))


def changed_steps(steps: Tensor, change: Tensor) -> Tensor:
    """fp16(step * (1 + change)); steps float16, change float32, both [out, in / 32]."""
    changed = torch.empty_like(steps)
    _fill_changed(changed, steps, change)
    return changed


def _changes_of_all_sizes(steps: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Random bit patterns as steps, so that zero, subnormal and huge ones are among them."""
    patterns = torch.empty_like(steps, dtype=torch.int16).random_(-(2**15), 2**15)
    sizes = torch.empty_like(change).random_(-24, 24).exp2_()
    return patterns.view(torch.float16).nan_to_num_(0.0), torch.randn_like(change).mul_(sizes)


@fused(trial=_changes_of_all_sizes)
def _fill_changed(out: Tensor, steps: Tensor, change: Tensor) -> None:
    out.copy_((steps.float() * (1.0 + change)).clamp_(-_FP16_MAX, _FP16_MAX))


class LowRank:
    """Scale * (up @ down), the same on every machine, tile by tile of its rows.

    The order of a float32 sum changes about half of the last bits and with them some codes, so the
    sum runs in float64 and is rounded once: two orders then agree but for one value in 2^28.
    """

    def __init__(self, up: Tensor, down: Tensor, scale: float) -> None:
        """Take the factors up [out, r] and down [r, width]."""
        self._up, self._down, self._scale = up.double(), down.double(), scale
        if math.frexp(scale)[0] == 0.5:  # a power of two: exact wherever it is multiplied in
            self._up, self._scale = self._up * scale, 1.0

    def of_rows(self, rows: slice) -> Tensor:
        """The product's rows, float64 [rows, width], to be rounded; autocast must be off."""
        product = self._up[rows] @ self._down
        return product if self._scale == 1 else product.mul_(self._scale)


def low_rank(up: Tensor, down: Tensor, scale: float) -> Tensor:
    """The whole of a `LowRank` product, float32 [out, width]."""
    with torch.autocast(up.device.type, enabled=False):
        return LowRank(up, down, scale).of_rows(slice(None)).float()


def deployed_dense(layer: "Layer", dtype: torch.dtype) -> Tensor:
    """The deployed weight as a dense matrix [out, in]; of a stack [E, out, in]."""
    return decode(deployed_weight(layer), dtype)
