"""bitsandbytes NF4 with double quant, tensor by tensor: made of a matrix, read and written.

The layout of the files is the one that transformers writes: beside `NAME.weight` lie its scales,
their own scales, both code books, and a tensor that holds shape and block sizes as JSON.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

_SETTINGS = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.uint8}
_SCALES_PER_SCALE = 256
_TILE_WEIGHTS = 1 << 18


def nf4_config(skipped: tuple[str, ...]) -> BitsAndBytesConfig:
    """NF4, double quant, bf16 compute, uint8 storage, and every other linear named as skipped.

    The skip list holds full names, because transformers matches keys from the start of a name or
    as a bare suffix: 'proj' would skip every q_proj.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=list(skipped),
    )


def quantized_nf4(weight: Tensor) -> Tensor:
    """Quantize a matrix [out, in] to a `Params4bit`, as loading a `Linear4bit` does in one piece.

    Here it goes by tiles of rows: on a CPU bitsandbytes takes 14 bytes per weight to work in.
    Only the scales' own scales are of the whole matrix.
    """
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    # An even number of rows whose width is a multiple of 32: no block of 64 is cut.
    rows = max(2, _TILE_WEIGHTS // weight.shape[1] // 2 * 2)
    plain = _SETTINGS | {"compress_statistics": False}
    tiles, states = zip(*(quantize_4bit(tile, **plain) for tile in weight.split(rows)), strict=True)
    scales = torch.cat([state.absmax for state in states])
    offset = scales.mean()
    coded, scales_of_scales = quantize_blockwise(scales - offset, blocksize=_SCALES_PER_SCALE)
    state = QuantState(
        absmax=coded,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=states[0].blocksize,
        code=states[0].code,
        quant_type=states[0].quant_type,
        offset=offset,
        state2=scales_of_scales,
    )
    return Params4bit(torch.cat(tiles), quant_state=state, bnb_quantized=True, **_SETTINGS)


def dequantized_nf4(weight: Tensor) -> Tensor:
    """Dequantize a `Params4bit`; returns [out, in] in the checkpoint's dtype."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def tensors_of_nf4(key: str, weight: Tensor) -> dict[str, Tensor]:
    """A `Params4bit` as the tensors of a file, named after its `key`, on the CPU."""
    state = weight.quant_state.as_dict(packed=True)
    parts = {key: weight.data} | {f"{key}.{part}": tensor for part, tensor in state.items()}
    return {name: tensor.cpu() for name, tensor in parts.items()}


def nf4_of_tensors(key: str, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The `Params4bit` that `tensors_of_nf4` has taken apart."""
    from bitsandbytes.nn import Params4bit

    state = {name.removeprefix(f"{key}."): part for name, part in tensors.items() if name != key}
    return Params4bit.from_prequantized(tensors[key], state, device=device)


def put_nf4(model: PreTrainedModel, name: str, weight: Tensor) -> None:
    """Put a `Linear4bit` of this `Params4bit` in the place of the linear of that name."""
    from bitsandbytes.nn import Linear4bit

    bias = model.get_submodule(name).bias
    out_features, in_features = weight.quant_state.shape
    linear = Linear4bit(
        in_features, out_features, bias=False, compute_dtype=torch.bfloat16, device="meta"
    )
    linear.weight, linear.bias = weight, bias
    make_safe(linear)
    model.set_submodule(name, linear)


def make_safe(linear: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking the weight of a `Linear4bit` in place (0.50, on some CPUs).

    A forward without gradients would, and whatever dequantizes or saves it later read garbage.
    """
    linear.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
