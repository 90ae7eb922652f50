import pytest
import torch
from store_cases import store_of
from torch import Tensor

from qatlora.base import stores
from qatlora.base.linear import GridLinear
from qatlora.base.nf4 import dequantized_nf4
from qatlora.base.stores import Bf16Store, reciprocal
from qatlora.grid import Q4Blocks, decode, recover

OUT, IN = 24, 128


def blocks_on_grid(seed: int = 0) -> Q4Blocks:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(OUT, IN // 32, generator=generator).mul(0.01).add(0.01).half()
    levels = torch.randint(-8, 8, (OUT, IN), generator=generator).to(torch.int8)
    levels[:, ::32] = -8  # as in a trained grid, every block reaches its end
    return Q4Blocks(steps, levels)


def latent_weight(seed: int = 0) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)).bfloat16() * 0.05


@pytest.mark.parametrize("kind", ["q4_0", "bf16"])
def test_a_base_on_a_grid_comes_back_exactly(kind: str):
    blocks = blocks_on_grid()
    weight = decode(blocks, torch.bfloat16)
    store = store_of(kind, weight)
    assert store.on_grid
    assert torch.equal(store.latents(), blocks.levels.float())
    # bf16 does not tell neighbouring fp16 steps apart, so the step may be another that explains it.
    assert torch.equal(decode(GridLinear("x", store).base_blocks(), torch.bfloat16), weight)


@pytest.mark.parametrize("kind", ["q4_0", "bf16", "nf4"])
def test_latents_of_a_base_on_a_grid_are_whole_levels(kind: str):
    latents = store_of(kind, decode(blocks_on_grid(), torch.bfloat16)).latents()
    assert torch.equal(latents, latents.round().clamp(-8, 7))


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_latents_elsewhere_are_the_stored_weight_in_steps(kind: str):
    store = store_of(kind, latent_weight())
    assert not store.on_grid
    stored = store.weight if kind == "bf16" else dequantized_nf4(store.weight)
    expected = stored.float() * reciprocal(store.steps).repeat_interleave(32, 1)
    torch.testing.assert_close(store.latents(), expected, rtol=1e-6, atol=0)
    assert (store.latents() - store.latents().round()).abs().max() > 0.3


def test_packed_codes_round_the_fractions_away():
    weight = latent_weight()
    levels = recover(weight).blocks.levels
    assert torch.equal(store_of("q4_0", weight).latents(), levels.float())


@pytest.mark.parametrize("kind", ["q4_0", "bf16", "nf4"])
def test_the_size_of_the_tiles_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch):
    store = store_of(kind, latent_weight())
    whole = store.latents()
    for tile_weights in (1, 5 * IN, OUT * IN - 1):
        monkeypatch.setitem(stores._TILE_WEIGHTS, "cpu", tile_weights)
        tiles = list(store.latent_tiles())
        assert [rows.start for rows, _ in tiles[1:]] == [rows.stop for rows, _ in tiles[:-1]]
        assert tiles[-1][0].stop == OUT
        assert torch.equal(torch.cat([tile for _, tile in tiles]), whole)


@pytest.mark.parametrize("kind", ["q4_0", "bf16", "nf4"])
def test_tiles_may_be_overwritten(kind: str):
    store = store_of(kind, latent_weight())
    before = store.latents()
    for _, tile in store.latent_tiles():
        tile.add_(1)
    assert torch.equal(store.latents(), before)


def test_blocks_without_a_step_are_listed_and_have_level_zero():
    blocks = blocks_on_grid()
    blocks.steps[3, 1] = 0
    blocks.levels[3, 32:64] = 0
    store = Bf16Store(decode(blocks, torch.bfloat16), blocks.steps, on_grid=True)
    assert store.zero_blocks.tolist() == [[3, 1]]
    assert not store.latents()[3, 32:64].any()
    assert reciprocal(blocks.steps)[3, 1] == 0


def test_digests_are_repeatable_and_tell_storages_and_weights_apart():
    weights = [latent_weight(0), latent_weight(1), decode(blocks_on_grid(), torch.bfloat16)]
    digests = [store_of(kind, w).digest() for kind in ("q4_0", "bf16", "nf4") for w in weights]
    assert len(set(digests)) == len(digests)
    assert store_of("nf4", weights[0]).digest() == digests[6]


def test_one_changed_weight_changes_the_digest():
    weight = latent_weight()
    steps = recover(weight).blocks.steps
    changed = weight.clone()
    changed[5, 7] += 0.01
    before = Bf16Store(weight, steps, on_grid=False).digest()
    assert Bf16Store(changed, steps, on_grid=False).digest() != before
