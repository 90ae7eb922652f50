"""The one function, against rules written out by hand; and the bases it starts from."""

import dataclasses

import pytest
import torch
from adapter_cases import IN, OUT, RULE, adapter
from peft import LoraConfig
from torch import Tensor

from qatlora.adapters.deployed import deployed_dense, deployed_weight, low_rank
from qatlora.adapters.layer import GridAdapter
from qatlora.base.linear import GridLinear
from qatlora.base.stores import Q4Store
from qatlora.grid import Q4Blocks, decode, dither, encode_reference


@pytest.mark.parametrize("kind", ["lora", "steps", "both"])
@pytest.mark.parametrize("on_grid", [True, False])
def test_zero_delta_returns_the_base_blocks(kind: str, on_grid: bool) -> None:
    layer = adapter(dataclasses.replace(RULE, kind=kind), filled=False, on_grid=on_grid)
    base, deployed = layer.get_base_layer().base_blocks(), deployed_weight(layer)
    assert torch.equal(base.steps.view(torch.int16), deployed.steps.view(torch.int16))
    assert torch.equal(base.levels, deployed.levels)


def test_lora_levels_follow_the_written_rule() -> None:
    layer = adapter(RULE)
    base = layer.get_base_layer().base_blocks()
    up, down = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
    delta = low_rank(up, down, 12.0 / 4)
    expected = torch.empty(OUT, IN, dtype=torch.int8)
    u = dither(7, "model.x", (OUT, IN))
    for row in range(OUT):
        for column in range(IN):
            step = base.steps[row, column // 32].float()
            moved = float(base.levels[row, column])
            if step != 0:
                moved = float(torch.tensor(moved) + delta[row, column] * (1.0 / step))
            rounded = torch.round(torch.tensor(moved, dtype=torch.float32) + u[row, column])
            expected[row, column] = int(rounded.clamp(-8, 7))
    deployed = deployed_weight(layer)
    assert torch.equal(deployed.levels, expected)
    assert torch.equal(deployed.steps, base.steps)
    assert (deployed.levels != base.levels).float().mean() > 0.05


def test_all_zero_block_is_never_moved() -> None:
    for kind in ("lora", "steps", "both"):
        deployed = deployed_weight(adapter(dataclasses.replace(RULE, kind=kind)))
        assert deployed.levels[2, 32:64].abs().max() == 0
        assert deployed.steps[2, 1] == 0


def test_latent_base_is_rounded_without_dither() -> None:
    layer = adapter(RULE, on_grid=False)
    other_seed = adapter(dataclasses.replace(RULE, seed=8), on_grid=False)
    for name in ("lora_A", "lora_B"):
        source, target = layer.parameters_of(name), other_seed.parameters_of(name)
        assert source is not None
        assert target is not None
        target.data.copy_(source)
    assert torch.equal(deployed_weight(layer).levels, deployed_weight(other_seed).levels)


def test_step_adapter_never_changes_a_level() -> None:
    layer = adapter(dataclasses.replace(RULE, kind="steps"))
    base, deployed = layer.get_base_layer().base_blocks(), deployed_weight(layer)
    assert torch.equal(base.levels, deployed.levels)
    factor = 1 + layer.lora_steps_B["default"].weight @ layer.lora_steps_A["default"].weight
    expected = (base.steps.float() * factor).half()
    assert torch.allclose(deployed.steps.float(), expected.float(), rtol=2**-10)
    assert not torch.equal(deployed.steps, base.steps)


def test_both_rounds_levels_by_the_base_steps() -> None:
    both = adapter(dataclasses.replace(RULE, kind="both"))
    lora = adapter(RULE)
    for name in ("lora_A", "lora_B"):
        source, target = both.parameters_of(name), lora.parameters_of(name)
        assert source is not None
        assert target is not None
        target.data.copy_(source)
    assert torch.equal(deployed_weight(both).levels, deployed_weight(lora).levels)


def test_reference_rounding_is_llama_cpps_rule_on_the_merged_weight() -> None:
    layer = adapter(dataclasses.replace(RULE, rounding="reference", dither="never"))
    base = decode(layer.get_base_layer().base_blocks())
    delta = low_rank(layer.lora_B["default"].weight, layer.lora_A["default"].weight, 3.0)
    expected, deployed = encode_reference(base + delta), deployed_weight(layer)
    assert torch.equal(deployed.levels, expected.levels)
    assert torch.equal(deployed.steps.view(torch.int16), expected.steps.view(torch.int16))


def test_overflowing_steps_stay_finite() -> None:
    layer = adapter(dataclasses.replace(RULE, kind="steps"))
    layer.lora_steps_B["default"].weight.data.fill_(1e9)
    assert torch.isfinite(deployed_weight(layer).steps).all()


def test_disabled_adapter_is_the_base() -> None:
    layer = adapter(dataclasses.replace(RULE, kind="both"))
    layer.enable_adapters(False)
    base = layer.get_base_layer()
    x = torch.randn(3, IN)
    assert torch.equal(deployed_dense(layer, torch.float32), decode(base.base_blocks()))
    assert torch.equal(layer(x), base(x))


def test_dither_makes_the_expected_change_equal_the_delta() -> None:
    """Without dither a delta of a tenth of a step moves nothing; with it a tenth of the levels."""
    levels = torch.randint(-6, 6, (64, 1024)).to(torch.int8)
    blocks = Q4Blocks(torch.full((64, 32), 0.01).half(), levels)

    def mean_change(dithered: bool) -> float:
        rule = dataclasses.replace(RULE, rank=1, alpha=1.0, dither="auto" if dithered else "never")
        store = Q4Store(blocks)
        layer = GridAdapter(GridLinear("model.y", store), "default", LoraConfig(), rule=rule)
        step = float(blocks.steps[0, 0])
        layer.lora_A["default"].weight.data.fill_(0.1 * step)
        layer.lora_B["default"].weight.data.fill_(1.0)
        return float((deployed_weight(layer).levels.float() - levels.float()).mean())

    assert mean_change(dithered=False) == 0
    assert abs(mean_change(dithered=True) - 0.1) < 0.005


def test_tiles_do_not_show_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = deployed_weight(adapter(RULE))
    monkeypatch.setitem(__import__("qatlora.base.stores").base.stores._TILE_WEIGHTS, "cpu", IN)
    by_rows = deployed_weight(adapter(RULE))
    assert torch.equal(whole.levels, by_rows.levels)


def test_low_rank_product_does_not_depend_on_the_order_of_the_sum() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(512, 16), torch.randn(16, 512)
    order = torch.randperm(16)
    first, second = low_rank(up, down, 2.0), low_rank(up[:, order], down[order], 2.0)
    in_fp32 = 2.0 * (up[:, order] @ down[order])
    assert differing(first, second) <= 2
    assert differing(first, in_fp32) > 1000


def differing(a: Tensor, b: Tensor) -> int:
    """Number of values that are not bit-identical."""
    return int((a != b).sum())
