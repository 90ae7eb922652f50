"""The dither: stored values, exactness, independence of tiling, and statistics."""

import pytest
import torch

from qatlora.errors import GridError
from qatlora.grid import dither, nearest_levels

NAME = "model.layers.0.self_attn.q_proj.weight"


def parts(fractions: torch.Tensor) -> torch.Tensor:
    return ((fractions + 0.5) * 65536 - 0.5).to(torch.int64)


def correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    """Correlation times sqrt(n): standard normal if the two are independent."""
    return float((left * right).sum() * 12 / left.numel() ** 0.5)


def test_stored_values_never_change() -> None:
    assert parts(dither(0, NAME, (1, 32)))[0, :8].tolist() == [
        6861,
        62510,
        23852,
        20131,
        47353,
        20514,
        64269,
        26922,
    ]
    assert parts(dither(1, NAME, (1, 32)))[0, :8].tolist() == [
        45600,
        48316,
        10426,
        61987,
        63225,
        27742,
        45153,
        61194,
    ]
    assert parts(dither(0, "lm_head.weight", (1, 32), start_row=2**30))[0, :8].tolist() == [
        33477,
        14553,
        6624,
        51128,
        44482,
        21095,
        19635,
        28396,
    ]


def test_no_dither_ever_moves_an_integer_latent() -> None:
    fractions = (torch.arange(65536) + 0.5) / 65536 - 0.5
    assert fractions.abs().max() < 0.5
    for level in range(-8, 8):
        assert (nearest_levels(level + fractions) == level).all()


def test_level_plus_dither_is_exact_in_fp32() -> None:
    fractions = dither(3, NAME, (8, 64))
    for level in range(-8, 8):
        assert torch.equal((level + fractions).double(), level + fractions.double())


def test_values_are_the_midpoints_of_65536_cells() -> None:
    k = (dither(0, NAME, (64, 64)).double() + 0.5) * 65536 - 0.5
    assert torch.equal(k, k.round())
    assert k.min() >= 0
    assert k.max() <= 65535


@pytest.mark.parametrize("rows_per_tile", [1, 3, 64, 300])
def test_tiles_equal_the_whole(rows_per_tile: int) -> None:
    whole = dither(5, NAME, (300, 608))
    tiles = [
        dither(5, NAME, (len(rows), 608), start_row=int(rows[0]))
        for rows in torch.arange(300).split(rows_per_tile)
    ]
    assert torch.equal(torch.cat(tiles), whole)


def test_experts_are_numbered_through() -> None:
    whole = dither(5, NAME, (4, 6, 96))
    assert torch.equal(whole[2], dither(5, NAME, (6, 96), start_row=12))
    assert torch.equal(whole.view(24, 96), dither(5, NAME, (24, 96)))


def test_an_empty_tile_is_allowed() -> None:
    assert dither(0, NAME, (0, 64)).shape == (0, 64)


def test_a_width_that_is_no_multiple_of_32_is_refused() -> None:
    with pytest.raises(GridError, match="multiple of 32"):
        dither(0, NAME, (4, 33))


def test_every_16_bit_value_is_equally_likely() -> None:
    for seed in range(3):
        counts = torch.bincount(parts(dither(seed, NAME, (4096, 1024))).flatten(), minlength=65536)
        expected = 4096 * 1024 / 65536
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 65535) < 5 * (2 * 65535) ** 0.5


def test_each_place_within_a_word_is_uniform_by_itself() -> None:
    values = parts(dither(11, NAME, (2048, 1024))).view(-1, 4)
    for place in range(4):
        for shift in (0, 8):  # low and high byte
            counts = torch.bincount(values[:, place] >> shift & 255, minlength=256)
            expected = len(values) / 256
            chi_square = float(((counts - expected) ** 2 / expected).sum())
            assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_pairs_fill_the_square_evenly() -> None:
    flat = parts(dither(2, NAME, (2048, 1024))).flatten() >> 11  # 32 x 32 cells
    for lag in (1, 2, 3, 4, 5, 8, 16, 32, 64, 640, 1024, 2048, 2560, 4096, 16384, 65536):
        counts = torch.bincount(flat[:-lag] * 32 + flat[lag:], minlength=1024)
        expected = (flat.numel() - lag) / 1024
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 1023) < 6 * (2 * 1023) ** 0.5, lag


def test_neighbours_and_rows_are_uncorrelated() -> None:
    flat = dither(4, NAME, (2048, 1024)).flatten()
    for lag in [*range(1, 65), 640, 1024, 2048, 3072, 8192, 2**17, 2**20]:
        assert abs(correlation(flat[:-lag], flat[lag:])) < 5, lag


def test_seeds_and_tensors_are_uncorrelated() -> None:
    first = dither(0, NAME, (1024, 1024))
    others = [dither(seed, NAME, (1024, 1024)) for seed in (1, 2, -1, 2**40)]
    others += [
        dither(0, f"model.layers.{layer}.mlp.up_proj.weight", (1024, 1024)) for layer in (0, 1, 10)
    ]
    for other in others:
        assert abs(correlation(first, other)) < 5
        assert not torch.equal(first, other)


def test_block_means_vary_as_much_as_independent_values_would() -> None:
    means = dither(9, NAME, (4096, 1024)).view(-1, 32).mean(1)
    ratio = float(means.var() * 12 * 32)
    assert abs(ratio - 1) < 5 * (2 / means.numel()) ** 0.5


@pytest.mark.gpu
def test_cuda_makes_the_same_dither() -> None:
    here = dither(3, NAME, (512, 1024), start_row=2**23)
    assert torch.equal(here, dither(3, NAME, (512, 1024), start_row=2**23, device="cuda").cpu())
