"""NF4 by tiles and by tensors is what bitsandbytes makes of a matrix in one piece."""

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from qatlora.base import nf4
from qatlora.base.nf4 import dequantized_nf4, nf4_of_tensors, quantized_nf4, tensors_of_nf4

CPU = torch.device("cpu")


def parts(state: object) -> list[torch.Tensor]:
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


@pytest.mark.parametrize("shape", [(96, 256), (161, 96), (7, 32), (1, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_give_the_bits_of_one_piece(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(nf4, "_TILE_WEIGHTS", 1024)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[0] = 0
    expected, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    found = quantized_nf4(weight)
    assert torch.equal(found.data, expected)
    for one, other in zip(parts(found.quant_state), parts(state), strict=True):
        assert torch.equal(one, other)
    assert found.quant_state.as_dict(packed=True).keys() == state.as_dict(packed=True).keys()


def test_the_tensors_of_a_file_are_the_same_weight_again():
    weight = quantized_nf4(torch.randn(64, 128, generator=torch.Generator().manual_seed(2)))
    again = nf4_of_tensors("a.weight", tensors_of_nf4("a.weight", weight), CPU)
    assert torch.equal(again.data, weight.data)
    assert torch.equal(dequantized_nf4(again), dequantized_nf4(weight))
