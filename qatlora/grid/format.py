"""The Q4_0 format of llama.cpp: encode as its reference does, decode, pack into GGUF bytes.

A block is 32 consecutive weights of a row and one fp16 step; a weight is step * level with an
integer level in -8..7. The file stores 18 bytes per block: the step, then 16 bytes whose byte j
holds code j in the low and code j + 16 in the high four bits (code = level + 8).

The reference encoder is kept here bit for bit, oddities included: it divides the signed value of
the first largest weight by -8 (so a positive peak makes a negative step, and an all-zero block
stores the step -0.0), takes the levels with the *unrounded* step, and rounds half away from the
lower code by adding 8.5 and truncating.

Sources: ggml/src/ggml-quants.c, quantize_row_q4_0_ref, of llama.cpp (as vendored by
llama-cpp-python 0.3.36); gguf-py gguf/quants.py, class Q4_0 (0.19).
"""

import hashlib
import math

import torch
from torch import Tensor

from qatlora.errors import GridError
from qatlora.grid.fused import fused
from qatlora.grid.spans import for_each_span
from qatlora.grid.types import BLOCK_SIZE, LEVEL_MAX, LEVEL_MIN, Q4Blocks

STEP_BYTES = 2
BLOCK_BYTES = STEP_BYTES + BLOCK_SIZE // 2
NUM_LEVELS = LEVEL_MAX - LEVEL_MIN + 1
_DECODED_BLOCKS = {"cpu": 1 << 15}
_DECODED_BLOCKS_ELSEWHERE = 1 << 18  # fewer launches


def encode_reference(weight: Tensor) -> Q4Blocks:
    """Quantize as llama.cpp's ``quantize_row_q4_0_ref`` does, bit for bit, in fp32.

    Args:
        weight: floating point [..., in]; ``in`` a multiple of 32. 3-D expert tensors work.

    Returns:
        Blocks whose step may be negative, -0.0 (zero block), zero (peak below fp16's range) or
        infinite (peak above 8 * 65504), as in the reference.

    Raises:
        GridError: width is no multiple of 32, or a weight is not finite.
    """
    flat = split_blocks(weight)
    steps = torch.empty(len(flat), dtype=torch.float16, device=flat.device)
    levels = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)

    def encode(span: slice) -> None:
        steps[span], levels[span] = _encode_blocks(flat[span].float())

    for_each_span(len(flat), flat.device, encode)
    return join_blocks(steps, levels, weight.shape)


def decode(blocks: Q4Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights [..., in]: fp32(step) * level, exact in fp32, then cast to ``dtype``."""
    steps, levels = blocks.steps.reshape(-1, 1), blocks.levels.reshape(-1, BLOCK_SIZE)
    weight = torch.empty(levels.shape, dtype=dtype, device=levels.device)
    # In parts, so that only a small one exists in fp32; it stays in a CPU's cache.
    size = _DECODED_BLOCKS.get(levels.device.type, _DECODED_BLOCKS_ELSEWHERE)
    for start in range(0, len(levels), size):
        part = slice(start, start + size)
        _fill_decoded(weight[part], levels[part], steps[part])
    return weight.view(blocks.levels.shape)


@fused()
def _fill_decoded(out: Tensor, levels: Tensor, steps: Tensor) -> None:
    out.copy_(levels.float().mul_(steps.float()))


def pack(blocks: Q4Blocks) -> Tensor:
    """Return GGUF's bytes of a Q4_0 tensor: uint8 [..., in / 32 * 18]."""
    codes = (blocks.levels - LEVEL_MIN).view(torch.uint8)
    low, high = codes.reshape(*blocks.steps.shape, BLOCK_SIZE).chunk(2, dim=-1)
    steps = blocks.steps.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.cat([steps, low | high << 4], dim=-1).flatten(-2)


def unpack(packed: Tensor) -> Q4Blocks:
    """Split GGUF's bytes, uint8 [..., in / 32 * 18], into steps and levels.

    Raises:
        GridError: not uint8, or the width is no multiple of 18.
    """
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] % BLOCK_BYTES:
        raise GridError(
            f"Packed Q4_0 bytes have shape {tuple(packed.shape)} and type {packed.dtype}, but a "
            f"row must be uint8 and a multiple of {BLOCK_BYTES} bytes wide (one block of "
            f"{BLOCK_SIZE} weights); read the tensor as raw bytes with its byte shape."
        )
    raw = packed.reshape(*packed.shape[:-1], packed.shape[-1] // BLOCK_BYTES, BLOCK_BYTES)
    steps = raw[..., :STEP_BYTES].contiguous().view(torch.float16).squeeze(-1)
    codes = raw[..., STEP_BYTES:]
    levels = torch.cat([codes & (NUM_LEVELS - 1), codes >> 4], dim=-1).view(torch.int8)
    return Q4Blocks(steps, levels.add_(LEVEL_MIN).flatten(-2))


def digest(blocks: Q4Blocks) -> str:
    """Return the SHA-256 (hex) of the packed bytes; the shape is not part of it."""
    packed = pack(blocks).cpu().contiguous()
    return hashlib.sha256(packed.numpy().data).hexdigest()


def nearest_levels(latents: Tensor) -> Tensor:
    """Round latents (weights in units of their step) half to even, clamp to -8..7; int8."""
    return nearest_levels_(latents.clone()).to(torch.int8)


def nearest_levels_(latents: Tensor) -> Tensor:
    """As `nearest_levels`, in place: the latents themselves become whole numbers."""
    return latents.round_().clamp_(LEVEL_MIN, LEVEL_MAX)


def latents(weight: Tensor, steps: Tensor) -> Tensor:
    """Return a weight [..., in] in units of its steps [..., in / 32]: fp32, 0 where the step is 0.

    Divided, not multiplied by a reciprocal: a decoded level divides to itself exactly.
    """
    wide_steps = steps.float()
    # A finite weight over infinity is 0; to mask the quotients would be a pass over all of them.
    divisors = torch.where(wide_steps == 0, math.inf, wide_steps)
    blocks = weight.to(torch.float32, copy=True).view(*steps.shape, BLOCK_SIZE)
    return blocks.div_(divisors.unsqueeze(-1)).view(weight.shape)


def split_blocks(weight: Tensor) -> Tensor:
    """View a weight [..., in] as blocks [n, 32], without its gradient.

    Raises:
        GridError: not floating point, or ``in`` is no multiple of 32.
    """
    if weight.ndim == 0 or weight.shape[-1] % BLOCK_SIZE or not weight.is_floating_point():
        raise GridError(
            f"A weight of shape {tuple(weight.shape)} and type {weight.dtype} cannot be stored as "
            f"Q4_0: the last dimension must be a multiple of {BLOCK_SIZE} and the values floating "
            "point. Leave this tensor out of the list of Q4_0 tensors; it is then exported in "
            "export.other_type."
        )
    return weight.detach().reshape(-1, BLOCK_SIZE)


def join_blocks(steps: Tensor, levels: Tensor, shape: torch.Size) -> Q4Blocks:
    """Give steps [n] and levels [n, 32] the shape of the weight they belong to."""
    return Q4Blocks(steps.view(*shape[:-1], shape[-1] // BLOCK_SIZE), levels.view(shape))


def _encode_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    step = first_peaks(values).div_(-8)
    inverse = torch.where(step == 0, 0.0, step.reciprocal())
    # Two roundings, as in C without contraction: a fused multiply-add would move ties.
    codes = (values * inverse.unsqueeze(1)).add_(8.5).clamp_(max=NUM_LEVELS - 1)
    levels = codes.to(torch.int8).add_(LEVEL_MIN)
    # A peak below 2^-125 has no finite inverse; x86 then converts inf and nan to code 0.
    levels[inverse.isinf()] = LEVEL_MIN
    return step.to(torch.float16), levels


def first_peaks(values: Tensor) -> Tensor:
    """Return the signed value of the first largest magnitude of each block: fp32 [n].

    An all-zero block has the peak +0.0.

    Raises:
        GridError: a value is not finite.
    """
    high, low = values.amax(-1), values.amin(-1)
    check_finite(torch.maximum(high, -low))
    peaks = torch.where(high > -low, high, low)
    tied = torch.nonzero(high == -low).squeeze(1)
    if len(tied):  # argmax is ten times slower than amax, and ties are rare
        first = values[tied].abs().argmax(-1, keepdim=True)
        peaks[tied] = values[tied].gather(1, first).squeeze(1)
    return peaks.add_(0.0)  # -0.0 becomes +0.0


def check_finite(peaks: Tensor) -> Tensor:
    """Return the peaks of the blocks, which are finite if all weights are.

    Raises:
        GridError: one is not.
    """
    if len(peaks) and not math.isfinite(peaks.amax().item()):
        raise GridError(
            "A weight is infinite or not a number, which has no place on the Q4_0 grid; the "
            "checkpoint is damaged or overflowed while it was merged. Load it again from its "
            "source, or merge in fp32."
        )
    return peaks
