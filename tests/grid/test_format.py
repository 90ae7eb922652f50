"""The format against its two judges: gguf-py's Q4_0 and llama.cpp's own llama-quantize."""

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qatlora.errors import GridError
from qatlora.grid import Q4Blocks, decode, digest, encode_reference, nearest_levels, pack, unpack

Q4_0 = gguf.GGMLQuantizationType.Q4_0
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def judge_pack(weight: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(quants.quantize(weight.numpy(), Q4_0))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def sample(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(24, 640, generator=generator)
    if kind == "heavy-tailed":
        return weight / torch.rand(24, 640, generator=generator).clamp_min(1e-3)
    if kind == "ties":  # many peaks of equal magnitude, weights halfway between two levels
        return torch.randint(-16, 17, (24, 640), generator=generator) * 0.25
    if kind == "mostly zero":
        return weight * (torch.rand(24, 640, generator=generator) < 0.02) + 0.0
    return weight * {"gauss": 1.0, "subnormal": 1e-39, "tiny": 3e-41, "overflow": 1e6}[kind]


KINDS = ["gauss", "heavy-tailed", "ties", "mostly zero", "subnormal", "tiny", "overflow"]


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_equals_gguf_byte_for_byte(kind: str) -> None:
    weight = sample(kind)
    assert torch.equal(pack(encode_reference(weight)), judge_pack(weight))


@given(hnp.arrays(np.float32, (2, 64), elements=FINITE))
def test_encoding_of_any_finite_block_equals_gguf(array: np.ndarray) -> None:
    weight = torch.from_numpy(array) + 0.0  # gguf-py alone tells -0.0 from 0.0 in a zero block
    assert torch.equal(pack(encode_reference(weight)), judge_pack(weight))


@given(hnp.arrays(np.uint8, (3, 36)))
def test_decoding_of_any_bytes_equals_gguf(array: np.ndarray) -> None:
    ours = decode(unpack(torch.from_numpy(array)))
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(quants.dequantize(array, Q4_0))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(bits(ours)[~ours.isnan()], bits(theirs)[~ours.isnan()])


@given(hnp.arrays(np.uint8, (2, 3, 36)))
def test_unpack_then_pack_returns_the_bytes(array: np.ndarray) -> None:
    packed = torch.from_numpy(array)
    assert torch.equal(pack(unpack(packed)), packed)


@settings(max_examples=50)
@given(hnp.arrays(np.float16, (2, 2)), hnp.arrays(np.int8, (2, 64), elements=st.integers(-8, 7)))
def test_pack_then_unpack_returns_the_blocks(steps: np.ndarray, levels: np.ndarray) -> None:
    blocks = Q4Blocks(torch.from_numpy(steps), torch.from_numpy(levels))
    back = unpack(pack(blocks))
    assert torch.equal(bits(back.steps), bits(blocks.steps))
    assert torch.equal(back.levels, blocks.levels)


def test_expert_tensors_keep_their_leading_dimensions() -> None:
    weight = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))
    blocks = encode_reference(weight)
    assert blocks.steps.shape == (3, 5, 3)
    assert blocks.levels.shape == decode(blocks).shape == (3, 5, 96)
    assert pack(blocks).shape == (3, 5, 54)
    assert torch.equal(pack(blocks)[2], pack(encode_reference(weight[2])))


def test_a_bf16_weight_is_encoded_from_its_fp32_values() -> None:
    weight = sample("gauss").bfloat16()
    assert torch.equal(pack(encode_reference(weight)), judge_pack(weight.float()))


def test_the_first_of_two_equal_peaks_decides_the_sign_of_the_step() -> None:
    weight = torch.zeros(2, 32)
    weight[0, [3, 20]] = torch.tensor([2.0, -2.0])
    weight[1, [3, 20]] = torch.tensor([-2.0, 2.0])
    blocks = encode_reference(weight)
    assert blocks.steps.flatten().tolist() == [-0.25, 0.25]
    assert blocks.levels[:, 3].tolist() == [-8, -8]
    assert blocks.levels[:, 20].tolist() == [7, 7]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_block_stores_minus_zero_and_level_zero(zero: float) -> None:
    blocks = encode_reference(torch.full((1, 32), zero))
    assert bits(blocks.steps).item() == -(2**15)  # llama.cpp: 0.0 / -8
    assert not blocks.levels.any()


def test_decode_rounds_the_exact_product_once() -> None:
    blocks = Q4Blocks(
        torch.tensor([[1.0009765625]], dtype=torch.float16),
        torch.full((1, 32), 7, dtype=torch.int8),
    )
    expected = torch.tensor(1.0009765625 * 7)
    assert (decode(blocks) == expected).all()
    assert (decode(blocks, torch.bfloat16) == expected.bfloat16()).all()


def test_latents_round_half_to_even_and_stop_at_the_ends() -> None:
    latents = torch.tensor([-9.0, -8.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 99.0])
    assert nearest_levels(latents).tolist() == [-8, -8, -2, -2, 0, 0, 2, 2, 6, 7, 7]


def test_the_digest_is_the_sha256_of_the_packed_bytes() -> None:
    blocks = encode_reference(torch.arange(64.0).view(2, 32))
    assert digest(blocks) == "0e6ac97e1417713813e48ad7cbedf7bfe2a9d4e28906257fe7c1b7c30a152d48"
    moved = Q4Blocks(blocks.steps, blocks.levels.clone())
    moved.levels[0, 0] += 1
    assert digest(moved) != digest(blocks)


@pytest.mark.parametrize("shape", [(4, 48), (33,), ()])
def test_a_width_that_is_no_multiple_of_32_names_shape_rule_and_remedy(
    shape: tuple[int, ...],
) -> None:
    with pytest.raises(GridError, match=r"shape \(.*multiple of 32.*Leave this tensor out"):
        encode_reference(torch.zeros(shape))


def test_integers_are_refused() -> None:
    with pytest.raises(GridError, match="floating point"):
        encode_reference(torch.zeros(2, 32, dtype=torch.int32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 40] = bad
    with pytest.raises(GridError, match="not a number"):
        encode_reference(weight)


@pytest.mark.parametrize("packed", [torch.zeros(2, 20, dtype=torch.uint8), torch.zeros(2, 18)])
def test_bytes_that_are_no_q4_0_rows_are_refused(packed: torch.Tensor) -> None:
    with pytest.raises(GridError, match="multiple of 18"):
        unpack(packed)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_encodes_and_decodes_the_same_bits(kind: str) -> None:
    weight = sample(kind)
    here = encode_reference(weight)
    there = encode_reference(weight.cuda())
    assert torch.equal(pack(here), pack(there).cpu())
    assert torch.equal(bits(decode(here)), bits(decode(there).cpu()))
    assert digest(here) == digest(there)
