"""Whole weights in bf16, and moments of 8 bits: they move as float32 ones do, and resume."""

import io
import itertools

import pytest
import torch
from torch import Tensor, nn

from qatlora.adapters.model import ParameterGroups
from qatlora.config import Optimizer, TrainConfig
from qatlora.plan.footprint import MOMENTS_BYTES
from qatlora.train.optimizers import RoundedAdamW, build_optimizer, round_stochastically

NUM_WEIGHTS = 1 << 14
RATE, NUM_STEPS = 1e-5, 30


def weights(dtype: torch.dtype) -> nn.Parameter:
    """Values that bf16 has, of both signs, around 0.1: neighbours lie 2^-11 apart there."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(128, 256, (64, NUM_WEIGHTS // 64), generator=generator)
    signs = torch.randint(2, sizes.shape, generator=generator) * 2 - 1
    return nn.Parameter((sizes * signs).mul(2.0**-11).to(dtype))


def gradient(step: int) -> Tensor:
    """Mostly of one sign, so that the updates add up."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (64, NUM_WEIGHTS // 64)
    return (1 + 0.5 * torch.randn(shape, generator=generator)).bfloat16()


def take_steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: range) -> None:
    for step in steps:
        weight.grad = gradient(step).to(weight.dtype)
        optimizer.step()


def optimizer_of(weight: nn.Parameter, kind: str, seed: int = 0) -> torch.optim.Optimizer:
    settings = TrainConfig(learning_rate=RATE, optimizer=Optimizer[kind])
    return build_optimizer(ParameterGroups([weight], steps=[]), settings, seed)


def movement(dtype: torch.dtype, kind: str) -> Tensor:
    """What NUM_STEPS steps add to each weight, float64."""
    weight = weights(dtype)
    before = weight.detach().double()
    take_steps(optimizer_of(weight, kind), weight, range(NUM_STEPS))
    return weight.detach().double() - before


def test_weights_of_a_grid_four_times_as_wide_move_by_as_many_levels() -> None:
    narrow, wide = weights(torch.float32), weights(torch.float32)
    before = narrow.detach().clone()
    with torch.no_grad():
        wide.mul_(4)
    for weight, size in ((narrow, 1.0), (wide, 4.0)):
        groups = ParameterGroups([weight], steps=[], level_size=size)
        take_steps(build_optimizer(groups, TrainConfig(), 0), weight, range(NUM_STEPS))
    assert not narrow.equal(before)
    assert wide.equal(4 * narrow)


def test_a_number_becomes_one_of_its_two_neighbours_and_itself_on_average() -> None:
    value = torch.tensor([0.1, -0.1, 1.0, -3.0, 0.0, 1e-3, 2.0**-130, -65535.7])
    num_draws = 1 << 14
    many = value.repeat(num_draws, 1)
    rounded = round_stochastically(many, torch.Generator().manual_seed(0)).double()
    below = (value.view(torch.int32) & -(1 << 16)).view(torch.float32).double()
    above = ((value.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32).double()
    exact = below == value.double()
    assert (rounded[:, exact] == value.double()[exact]).all()
    assert ((rounded == below) | (rounded == above)).all()
    error = (rounded.mean(0) - value.double()).abs()
    assert (error <= 4 * 0.5 * (above - below).abs() / num_draws**0.5).all()


def test_plain_bf16_stands_still_where_the_rounded_optimizer_moves_as_float32_does() -> None:
    expected = movement(torch.float32, "adamw")
    assert expected.abs().mean() < 2**-11  # less than one gap of bf16 in all
    plain = weights(torch.bfloat16)
    take_steps(torch.optim.AdamW([plain], lr=RATE, weight_decay=0.0), plain, range(NUM_STEPS))
    assert torch.equal(plain, weights(torch.bfloat16))
    found = movement(torch.bfloat16, "adamw")
    # A weight's error is below one gap; that of their mean is smaller by the root of their number.
    bound = 4 * 2**-11 / NUM_WEIGHTS**0.5
    assert abs(found.mean() - expected.mean()) < bound < 0.06 * abs(expected.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_8_bits_move_weights_as_those_of_32_do(dtype: torch.dtype) -> None:
    expected, found = movement(torch.float32, "adamw"), movement(dtype, "adamw_8bit")
    assert abs(found.mean() / expected.mean() - 1) < 0.08


def test_float32_with_adamw_is_torchs_own() -> None:
    weight = weights(torch.float32)
    assert type(optimizer_of(weight, "adamw")) is torch.optim.AdamW


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_take_what_the_plan_counts(dtype: torch.dtype, kind: str) -> None:
    weight = weights(dtype)
    optimizer = optimizer_of(weight, kind)
    take_steps(optimizer, weight, range(1))
    held = {name: one for name, one in optimizer.state[weight].items() if "map" not in name}
    taken = sum(one.nbytes for one in held.values() if isinstance(one, Tensor) and one.ndim)
    assert taken == NUM_WEIGHTS * MOMENTS_BYTES[kind]


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_resumed_optimizer_goes_on_bit_for_bit(kind: str) -> None:
    whole, resumed = weights(torch.bfloat16), weights(torch.bfloat16)
    take_steps(optimizer_of(whole, kind), whole, range(6))
    first = optimizer_of(resumed, kind)
    take_steps(first, resumed, range(3))
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    again = optimizer_of(resumed, kind)
    again.load_state_dict(torch.load(stored, weights_only=True))
    take_steps(again, resumed, range(3, 6))
    assert torch.equal(whole, resumed)
    assert isinstance(again, RoundedAdamW)
    moments = [again.state[resumed][name] for name in ("state1", "state2")]
    wanted = torch.uint8 if kind == "adamw_8bit" else torch.float32
    assert {moment.dtype for moment in moments} == {wanted}


def test_another_seed_rounds_otherwise_and_so_does_every_step_and_parameter() -> None:
    def rounding(seed: int, num_steps: int) -> list[Tensor]:
        pair = [weights(torch.bfloat16), weights(torch.bfloat16)]
        optimizer = RoundedAdamW([{"params": pair, "lr": RATE}], seed, weight_decay=0.0)
        for _ in range(num_steps):
            for one in pair:
                one.grad = torch.ones_like(one)
            optimizer.step()
        return pair

    seen = [*rounding(0, 1), *rounding(1, 1), *rounding(0, 2)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(seen, 2))
    assert torch.equal(rounding(0, 1)[1], seen[1])
