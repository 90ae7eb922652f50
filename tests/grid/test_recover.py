"""Lattice recovery: what was put on a grid is found, and nothing else is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qatlora.errors import GridError
from qatlora.grid import Q4Blocks, decode, detect, encode_reference, explains, recover

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on_grid_weight(step_type: torch.dtype, rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as QAT checkpoints store it, fp32 before rounding, and its levels: [rows, 2048].

    Gaussian and heavy-tailed halves; steps finer than the peaks ask for, so that peaks vary.
    """
    generator = torch.Generator().manual_seed(11)
    latent = torch.randn(rows, 64, 32, generator=generator) * 0.02
    latent[rows // 2 :] /= torch.rand(rows - rows // 2, 64, 32, generator=generator).clamp_min(0.2)
    steps = latent.abs().amax(-1) / (3.6 + 5 * torch.rand(rows, 64, generator=generator))
    steps = steps.to(step_type).float().unsqueeze(-1)
    levels = (latent / steps).round().clamp(-8, 7)
    return (levels * steps).flatten(1), levels.flatten(1).to(torch.int8)


def ordinary_weight(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(256, 2048, generator=generator)
    if kind == "heavy-tailed":
        weight /= torch.rand(256, 2048, generator=generator).clamp_min(1e-4)
    if kind == "uniform":
        weight = torch.rand(256, 2048, generator=generator) - 0.5
    if kind == "laplace":
        weight = weight.sign() * torch.rand(256, 2048, generator=generator).log()
    return weight * 0.02


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("step_type", [torch.bfloat16, torch.float16])
def test_every_block_of_a_grid_that_fp16_holds_is_found_exactly(
    step_type: torch.dtype, stored: torch.dtype
) -> None:
    exact, levels = on_grid_weight(step_type)
    blocks, on_grid = recover(exact.to(stored))
    assert on_grid.all()
    assert explains(blocks, exact.to(stored)).all()
    same = (blocks.levels == levels).view(-1, 32).all(-1)
    assert same.float().mean() > 0.99  # the rest: levels with a common divisor
    ratio = levels.view(-1, 32)[~same].float() / blocks.levels.view(-1, 32)[~same]
    assert (ratio.nan_to_num(nan=2).abs() >= 2).all()


@pytest.mark.parametrize("stored", DTYPES)
def test_every_block_of_an_fp32_step_grid_is_found_within_rounding(stored: torch.dtype) -> None:
    exact, levels = on_grid_weight(torch.float32)
    weight = exact.to(stored)
    blocks, on_grid = recover(weight)
    assert on_grid.all()
    assert (blocks.levels == levels).view(-1, 32).all(-1).float().mean() > 0.99
    rounding = 2.0**-11 + {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(stored, 2.0**-23)
    error = (decode(blocks) - weight.float()).abs()
    assert (error <= weight.float().abs() * rounding * (1 + 2.0**-8)).all()
    if stored == torch.bfloat16:
        assert explains(blocks, weight).float().mean() > 0.85


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("kind", ["gauss", "heavy-tailed", "uniform", "laplace"])
def test_no_block_of_ordinary_weights_is_on_a_grid(kind: str, stored: torch.dtype) -> None:
    weight = ordinary_weight(kind).to(stored)
    blocks, on_grid = recover(weight)
    assert not on_grid.any()
    ours = (decode(blocks) - weight.float()).square().sum()
    reference = (decode(encode_reference(weight)) - weight.float()).square().sum()
    assert ours < reference


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.uint16, (4,), elements=st.integers(0x0001, 0x7BFF)),
    hnp.arrays(np.int8, (4, 32), elements=st.integers(-8, 7)),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_decoded_blocks_are_explained_exactly(
    steps: np.ndarray, levels: np.ndarray, negative: bool, stored: torch.dtype
) -> None:
    fp16 = torch.from_numpy(steps.view(np.float16).copy())[:, None]
    blocks = Q4Blocks(-fp16 if negative else fp16, torch.from_numpy(levels))
    weight = decode(blocks, stored)
    if stored == torch.float16 and weight.isinf().any():
        return  # no checkpoint stores infinities; recover refuses them
    found, on_grid = recover(weight)
    assert on_grid.all()
    assert explains(found, weight).all()
    wrong_way = (found.steps < 0).squeeze(1) & ~((found.levels == -8).any(-1))
    assert not wrong_way.any()
    if stored == torch.float32:  # nothing is lost in storage, so no larger step is missed
        assert ((found.steps.abs() >= fp16) | (weight == 0).all(-1, keepdim=True)).all()


def exact_peak_level(block: torch.Tensor) -> int | None:
    """The lowest peak level at which some fp16 step decodes to the stored block: by trying all."""
    peak = block.float().abs().max()
    if peak == 0:
        return 0
    for peak_level in range(1, 9):
        near = (peak / peak_level).half().view(torch.int16)
        steps = (near + torch.arange(-40, 41, dtype=torch.int16)).view(torch.float16).float()
        steps = torch.cat([steps, -steps])[:, None]
        levels = (block.float() / steps).round().clamp(-8, 7)
        exact = ((levels * steps).to(block.dtype) == block).all(-1)
        if (exact & (levels.abs().amax(-1) == peak_level)).any():
            return peak_level
    return None


@pytest.mark.parametrize("stored", DTYPES)
def test_the_exact_fit_of_the_largest_step_is_the_one_that_trying_all_steps_finds(
    stored: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(8)
    divisors = torch.randint(1, 5, (150, 1), generator=generator)
    levels = torch.randint(-8, 8, (150, 32), generator=generator).div(
        divisors, rounding_mode="trunc"
    )
    levels[:50] = (levels[:50] * divisors[:50]).clamp(-8, 7)  # with a common divisor
    steps = 0.01 * (1 + torch.rand(150, 1, generator=generator))
    steps[::3] = steps[::3].bfloat16().float()
    weight = (levels * steps.half().float()).to(stored)
    weight[75:100] = (levels[75:100] * steps[75:100]).to(stored)  # fp32 steps
    weight[100:110] = torch.randn(10, 32, generator=generator).to(stored)
    found, on_grid = recover(weight)
    for row, block in enumerate(weight):
        peak_level = exact_peak_level(block)
        if peak_level is not None:
            assert on_grid[row]
            assert found.levels[row].abs().max() == peak_level
            assert explains(
                Q4Blocks(*(part[row : row + 1] for part in found)), weight[row : row + 1]
            )


@pytest.mark.parametrize("stored", DTYPES)
def test_detection_is_recovery_without_the_search(stored: torch.dtype) -> None:
    exact, _ = on_grid_weight(torch.float32, rows=4)
    weight = torch.cat([exact, ordinary_weight("gauss")[:4], torch.zeros(1, 2048)]).to(stored)
    assert torch.equal(detect(weight), recover(weight).on_grid)
    assert detect(weight.view(3, 3, 2048)).shape == (3, 3, 64)


@pytest.mark.parametrize("parameter", range(3))
def test_few_false_positives_even_of_weights_that_another_grid_made(parameter: int) -> None:
    """Uniform 4-bit blocks with a minimum (Q4_1), 8 bits, and NF4-like levels are not Q4_0."""
    weight = ordinary_weight("gauss")
    blocks = weight.view(-1, 32)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    if parameter == 0:
        step = ((high - low) / 15).half().float()
        made = ((blocks - low) / step).round() * step + low.half().float()
    elif parameter == 1:
        step = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
        made = (blocks / step).round() * step
    else:
        peak = blocks.abs().amax(-1, keepdim=True)
        made = (blocks / peak).mul(2.5).tanh().mul(7).round().div(7.2).atanh().div(2.5) * peak
    assert recover(made.view_as(weight).bfloat16()).on_grid.float().mean() < 0.005


@pytest.mark.parametrize("divisor", range(1, 8))
def test_a_common_divisor_goes_into_the_step(divisor: int) -> None:
    levels = torch.arange(32) % (7 // divisor + 1) * divisor
    found, on_grid = recover(levels * 0.25)
    assert on_grid.all()
    assert found.steps.item() == 0.25 * divisor
    assert torch.equal(found.levels * divisor, levels.to(torch.int8))


def test_a_divisor_that_costs_exactness_stays_in_the_levels() -> None:
    step = torch.tensor(1.0009765625, dtype=torch.float16)  # three steps are no fp16 number
    levels = torch.tensor([3, 6, -3, -6] * 8, dtype=torch.int8)
    weight = levels * step.float()
    found, _ = recover(weight)
    assert explains(found, weight).all()
    assert found.steps.item() == step.item()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_the_weight_is_left_as_it_was(num_blocks: int, stored: torch.dtype) -> None:
    weight = ordinary_weight("gauss")[:num_blocks, :32].to(stored)
    before = weight.clone()
    recover(weight)
    assert torch.equal(weight, before)


def test_minus_eight_on_a_positive_peak_needs_a_negative_step() -> None:
    levels = torch.arange(32) % 16 - 7  # -7..8
    found, on_grid = recover((levels * 0.5).bfloat16())
    assert on_grid.all()
    assert found.steps.item() == -0.5
    assert torch.equal(found.levels, -levels.to(torch.int8))


def test_plus_and_minus_eight_together_are_off_the_grid() -> None:
    weight = ((torch.arange(32) % 17 - 8) * 0.5).bfloat16()
    assert not recover(weight).on_grid.any()


def test_reference_encoded_blocks_come_back() -> None:
    blocks = encode_reference(ordinary_weight("gauss"))
    weight = decode(blocks, torch.bfloat16)
    found, on_grid = recover(weight)
    assert on_grid.all()
    assert explains(found, weight).all()
    assert (found.steps < 0).float().mean() > 0.3  # their positive peaks are at -8


def test_a_zero_block_has_step_zero_and_counts_as_on_the_grid() -> None:
    found, on_grid = recover(torch.tensor([0.0, -0.0] * 32).bfloat16())
    assert on_grid.all()
    assert found.steps.tolist() == [0.0, 0.0]
    assert not found.levels.any()


@pytest.mark.parametrize("value", [0.3, -0.3, 2.0**-20])
def test_one_magnitude_is_level_one(value: float) -> None:
    weight = torch.zeros(2, 32)
    weight[0, 5] = value
    weight[1] = value * (1 - 2 * (torch.arange(32) % 2))
    weight = weight.bfloat16()
    found, on_grid = recover(weight)
    assert on_grid.all()
    assert explains(found, weight).all()
    assert found.steps.flatten().tolist() == [abs(float(weight[0, 5]))] * 2
    assert found.levels.abs().max() == 1


@pytest.mark.parametrize("scale", [2.0**-40, 1e-39, 2.0**30])
def test_a_grid_beyond_the_range_of_fp16_is_off_the_grid(scale: float) -> None:
    weight = ((torch.arange(32) % 15 - 7) * scale).bfloat16()
    found, on_grid = recover(weight)
    assert not on_grid.any()
    assert found.steps.isfinite().all()


def test_one_weight_moved_by_one_bit_of_many_takes_the_block_off_the_grid() -> None:
    exact, _ = on_grid_weight(torch.bfloat16, rows=2)
    weight = exact.bfloat16()
    peak = weight[0, :32].abs().argmax()
    weight[0, :32].view(torch.int16)[peak] += 4
    on_grid = recover(weight).on_grid
    assert not on_grid[0, 0]
    assert on_grid.flatten()[1:].all()


def test_mixed_and_expert_tensors_are_solved_block_by_block() -> None:
    exact, _ = on_grid_weight(torch.float16, rows=16)
    weight = exact.bfloat16().view(4, 4, 2048).clone()
    weight[1, 2, 64:96] = torch.randn(32, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, on_grid = recover(weight)
    assert on_grid.shape == found.steps.shape == (4, 4, 64)
    assert on_grid.logical_not().nonzero().tolist() == [[1, 2, 2]]
    assert torch.equal(explains(found, weight), on_grid)


def test_threads_and_spans_do_not_change_the_result() -> None:
    exact, _ = on_grid_weight(torch.float32, rows=700)
    whole = recover(exact.bfloat16())
    rows = [recover(row) for row in exact.bfloat16()[::97]]
    assert torch.equal(whole.blocks.levels[::97], torch.stack([row.blocks.levels for row in rows]))
    assert torch.equal(whole.blocks.steps[::97], torch.stack([row.blocks.steps for row in rows]))


def test_no_gradient_is_recorded() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 64))
    assert not recover(weight).blocks.steps.requires_grad


def test_an_empty_tensor_is_recovered_to_an_empty_one() -> None:
    assert recover(torch.zeros(0, 64)).blocks.steps.shape == (0, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 40] = bad
    with pytest.raises(GridError, match="not a number"):
        recover(weight)


def test_a_width_that_is_no_multiple_of_32_is_refused() -> None:
    with pytest.raises(GridError, match="multiple of 32"):
        recover(torch.zeros(2, 40))


@pytest.mark.gpu
@pytest.mark.parametrize("stored", DTYPES)
def test_cuda_recovers_the_same_blocks(stored: torch.dtype) -> None:
    exact, _ = on_grid_weight(torch.float32)
    weight = exact.to(stored)
    here, there = recover(weight), recover(weight.cuda())
    assert torch.equal(here.on_grid, there.on_grid.cpu())
    assert torch.equal(here.blocks.steps, there.blocks.steps.cpu())
    assert torch.equal(here.blocks.levels, there.blocks.levels.cpu())
