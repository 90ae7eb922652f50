"""The custom backward against a slow dense surrogate: the straight-through gradient written out."""

import pytest
import torch
from adapter_cases import (
    IN,
    NAMES,
    OUT,
    RULE,
    RULES,
    adapter,
    factor_gradients,
    random_blocks,
    store_of,
)
from torch import Tensor

from qatlora.adapters.deployed import AdapterRule, deployed_dense
from qatlora.adapters.layer import GridAdapter
from qatlora.base.linear import GridLinear


def dense_surrogate(layer: GridAdapter, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """All gradients in float64 from g = dY^T X, by the formulas: no tricks, no tiles."""
    x, grad_y = x.double(), grad_y.double()
    grads = factor_gradients(layer, grad_y.T @ x)
    return grads | {"x": grad_y @ deployed_dense(layer, torch.float64)}


def run(layer: GridAdapter, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """Forward and backward through the layer."""
    x = x.clone().requires_grad_()
    layer(x).backward(grad_y)
    assert x.grad is not None
    grads = {"x": x.grad}
    for name in NAMES:
        parameter = layer.parameters_of(name)
        if parameter is not None:
            assert parameter.grad is not None
            grads[name] = parameter.grad
    return grads


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.rounding}")
@pytest.mark.parametrize("on_grid", [True, False])
def test_gradients_equal_the_dense_surrogate(rule: AdapterRule, on_grid: bool) -> None:
    layer = adapter(rule, on_grid=on_grid)
    torch.manual_seed(3)
    x, grad_y = torch.randn(5, IN), torch.randn(5, OUT)
    expected = dense_surrogate(layer, x, grad_y)
    for name, grad in run(layer, x, grad_y).items():
        scale = expected[name].abs().max()
        assert (grad.double() - expected[name]).abs().max() <= 2e-6 * scale, name


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.rounding}")
def test_tiles_of_rows_do_not_show_in_the_gradient(
    rule: AdapterRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    x, grad_y = torch.randn(5, IN), torch.randn(5, OUT)
    whole = run(adapter(rule), x, grad_y)
    monkeypatch.setattr("qatlora.adapters.autograd._TILE_WEIGHTS", 2 * IN)
    for name, grad in run(adapter(rule), x, grad_y).items():
        assert torch.allclose(grad, whole[name], rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.rounding}")
def test_forward_is_the_deployed_matrix_product(rule: AdapterRule) -> None:
    layer = adapter(rule)
    x = torch.randn(2, 4, IN)
    assert torch.equal(layer(x), x @ deployed_dense(layer, torch.float32).T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x.bfloat16() @ deployed_dense(layer, torch.bfloat16).T)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.rounding}")
def test_gradient_checkpointing_gives_the_same_gradients(rule: AdapterRule) -> None:
    torch.manual_seed(3)
    x, grad_y = torch.randn(5, IN), torch.randn(5, OUT)
    plain = run(adapter(rule), x, grad_y)
    layer = adapter(rule)
    again = x.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, again, use_reentrant=False)
    y.backward(grad_y)
    for name in NAMES:
        parameter = layer.parameters_of(name)
        if parameter is not None:
            assert torch.equal(parameter.grad, plain[name])


def test_a_held_weight_gives_the_same_output_and_never_serves_training() -> None:
    layer = adapter(RULE)
    x = torch.randn(3, IN)
    expected = layer(x)
    layer.held_weight = deployed_dense(layer, torch.float32)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    layer.lora_B["default"].weight.data.mul_(3)
    assert not torch.equal(layer(x), expected)


def test_optimizer_step_between_forward_and_backward_is_refused() -> None:
    layer = adapter(RULE)
    y = layer(torch.randn(3, IN))
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.rounding}")
def test_kept_blocks_give_the_same_gradients_as_computed_ones(rule: AdapterRule) -> None:
    torch.manual_seed(3)
    x, grad_y = torch.randn(5, IN), torch.randn(5, OUT)
    computed = run(adapter(rule), x, grad_y)
    layer = adapter(rule)
    layer.keeps_blocks = True
    for name, grad in run(layer, x, grad_y).items():
        assert torch.equal(grad, computed[name]), name


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, OUT)], ids=["plain", "bias"])
@pytest.mark.parametrize("on_grid", [True, False])
def test_a_frozen_layer_is_a_linear_of_its_decoded_blocks_and_keeps_nothing(
    on_grid: bool, bias: Tensor | None
) -> None:
    layer = GridLinear("model.x", store_of(random_blocks(), on_grid=on_grid), bias)
    weight = deployed_dense(layer, torch.float32)
    torch.manual_seed(3)
    x, grad_y = torch.randn(2, 5, IN), torch.randn(2, 5, OUT)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(ours)
    assert saved == []
    expected = plain @ weight.T if bias is None else plain @ weight.T + bias
    assert torch.equal(y, expected)
    y.backward(grad_y)
    expected.backward(grad_y)
    assert torch.equal(ours.grad, plain.grad)
