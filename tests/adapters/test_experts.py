"""Experts inside the grid, against transformers' own and a slow dense surrogate in float64."""

import dataclasses
from pathlib import Path

import pytest
import torch
from adapter_cases import NAMES, RULE, RULES, factor_gradients, fill, random_blocks, store_of
from loaded_cases import adapted_model, loaded
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from torch.nn.functional import gelu
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from qatlora.adapters import autograd
from qatlora.adapters.deployed import AdapterRule, deployed_dense, deployed_weight, low_rank
from qatlora.adapters.expert_layer import StackAdapter
from qatlora.adapters.saved import load_adapter, save_adapter
from qatlora.base.experts import ExpertStack, RoutedExperts, put_layer
from qatlora.base.linear import GridLinear
from qatlora.base.load import load_plain
from qatlora.grid import decode, dither

EXPERTS, HIDDEN, INTERMEDIATE = 5, 96, 64
PROJECTIONS = {
    "gate_up_proj": (2 * INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
ROUTES = torch.tensor([[0, 1], [1, 3], [3, 0], [4, 1], [1, 0], [3, 4]])  # [T, K]; nobody to 2


def plain_experts() -> Gemma4TextExperts:
    config = Gemma4TextConfig(
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        top_k_experts=2,
        enable_moe_block=True,
        experts_implementation="eager",
    )
    return Gemma4TextExperts(config)


def routed(rule: AdapterRule | None, *, on_grid: bool = True, filled: bool = True) -> RoutedExperts:
    """Experts of random blocks, with an adapter on both stacks unless `rule` is None."""
    model = torch.nn.ModuleDict({"layer": torch.nn.ModuleDict({"experts": plain_experts()})})
    torch.manual_seed(1)
    for name, shape in PROJECTIONS.items():
        blocks = [random_blocks(seed, shape) for seed in range(EXPERTS)]
        stores = [store_of(one, on_grid=on_grid) for one in blocks]
        put_layer(model, f"layer.experts.{name}", stores)
    experts = model["layer"]["experts"]
    for name in PROJECTIONS if rule is not None else ():
        adapter = StackAdapter(getattr(experts, name), "default", LoraConfig(), rule=rule)
        if filled:
            fill(adapter)
        setattr(experts, name, adapter)
    return experts


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, router weights [T, K] and the gradient of the output."""
    torch.manual_seed(3)
    return torch.randn(6, HIDDEN), torch.rand(6, 2), torch.randn(6, HIDDEN)


def dense_surrogate(experts: RoutedExperts) -> dict[str, Tensor]:
    """All gradients in float64: token by token through dense weights, then by the formulas."""
    x, weights, grad_y = (part.double().requires_grad_() for part in tokens())
    dense = {
        name: deployed_dense(getattr(experts, name), torch.float64).requires_grad_()
        for name in PROJECTIONS
    }
    output = []
    for token in range(len(x)):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for weight, expert in zip(weights[token], ROUTES[token], strict=True):
            gate, up = (dense["gate_up_proj"][expert] @ x[token]).chunk(2)
            inner = gelu(gate, approximate="tanh") * up
            total = total + weight * (dense["down_proj"][expert] @ inner)
        output.append(total)
    torch.stack(output).backward(grad_y.detach())
    grads = {"x": x.grad, "router": weights.grad}
    for name, weight in dense.items():
        pairs = zip(getattr(experts, name).linears(), weight.grad, strict=True)
        each = [factor_gradients(expert, g) for expert, g in pairs]
        grads |= {f"{name}.{key}": torch.cat([one[key] for one in each]) for key in each[0]}
    return grads


def run(experts: RoutedExperts) -> dict[str, Tensor]:
    """Forward and backward through the layer."""
    x, weights, grad_y = tokens()
    x.requires_grad_()
    weights.requires_grad_()
    experts(x, ROUTES, weights).backward(grad_y)
    grads = {"x": x.grad, "router": weights.grad}
    for name in PROJECTIONS:
        for key in NAMES:
            parameter = getattr(experts, name).parameters_of(key)
            if parameter is not None:
                grads[f"{name}.{key}"] = parameter.grad
    return grads


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.rounding}")
@pytest.mark.parametrize("on_grid", [True, False])
def test_gradients_equal_the_dense_surrogate(rule: AdapterRule, on_grid: bool) -> None:
    experts = routed(rule, on_grid=on_grid)
    expected, grads = dense_surrogate(experts), run(experts)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        scale = expected[name].abs().max()
        assert (grad.double() - expected[name]).abs().max() <= 5e-6 * scale, name


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_that_of_transformers_with_the_deployed_weights(
    adapted: bool, dtype: torch.dtype
) -> None:
    experts, plain = routed(RULE if adapted else None), plain_experts()
    for name in PROJECTIONS:
        weight = deployed_dense(getattr(experts, name), dtype)
        setattr(plain, name, torch.nn.Parameter(weight))
    x, weights, _ = tokens()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
        expected = plain(x, ROUTES, weights)
        assert torch.equal(experts(x, ROUTES, weights), expected)
        for name in PROJECTIONS:
            stack = getattr(experts, name)
            stack.held_weight = deployed_dense(stack, dtype)
        assert torch.equal(experts(x, ROUTES, weights), expected)


@pytest.mark.parametrize("keeps", [False, True])
def test_only_experts_that_were_routed_to_are_deployed_one_at_a_time(
    keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, deployed = routed(RULE), []

    def watched(layer):
        deployed.append(layer.get_base_layer())
        return deployed_weight(layer)

    monkeypatch.setattr(autograd, "deployed_weight", watched)
    for name in PROJECTIONS:
        getattr(experts, name).keeps_blocks = keeps
    grads = run(experts)
    hit = sorted(set(ROUTES.flatten().tolist()))
    for name in PROJECTIONS:
        linears = getattr(experts, name).get_base_layer().linears()
        counts = [deployed.count(linear) for linear in linears]
        assert counts == [(1 if keeps else 2) * (expert in hit) for expert in range(EXPERTS)]
        unrouted = grads[f"{name}.lora_B"].chunk(EXPERTS)[2]
        assert not unrouted.any()
    assert len(hit) < EXPERTS


def test_nothing_as_large_as_a_weight_is_kept_for_the_backward_pass() -> None:
    experts, saved = routed(RULE), []
    parameters = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    x, weights, _ = tokens()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        experts(x.requires_grad_(), ROUTES, weights)
    others = [t for t in saved if t.untyped_storage().data_ptr() not in parameters]
    assert others
    assert max(t.numel() for t in others) <= len(x) * 2 * INTERMEDIATE


def test_an_expert_is_moved_by_its_own_factors_and_its_own_rows_of_the_dither() -> None:
    stack = routed(RULE).gate_up_proj
    deployed, base = deployed_weight(stack), stack.get_base_layer()
    out, width = PROJECTIONS["gate_up_proj"]
    noise = dither(RULE.seed, base.tensor_name, (EXPERTS, out, width))
    down = stack.lora_A["default"].weight.detach().reshape(EXPERTS, RULE.rank, width)
    up = stack.lora_B["default"].weight.detach().reshape(EXPERTS, out, RULE.rank)
    for expert, linear in enumerate(base.linears()):
        blocks = linear.base_blocks()
        steps = blocks.steps.float().repeat_interleave(32, dim=1)
        moved = low_rank(up[expert], down[expert], RULE.scale) * torch.where(
            steps == 0, 0, 1 / steps
        )
        expected = (blocks.levels + moved + noise[expert]).round().clamp(-8, 7).to(torch.int8)
        assert torch.equal(deployed.levels[expert], expected)
    assert not torch.equal(deployed.levels, base.base_blocks().levels)


def test_the_factors_are_those_of_pefts_target_parameters_but_for_the_order_of_b() -> None:
    stack = routed(RULE).gate_up_proj
    peft = ParamWrapper(
        plain_experts(), "default", "gate_up_proj", LoraConfig(), RULE.rank, int(RULE.alpha)
    )
    down, up = (stack.parameters_of(name).detach() for name in NAMES[:2])
    per_expert = up.unflatten(0, (EXPERTS, -1))
    peft.lora_A["default"].weight.data.copy_(down)
    peft.lora_B["default"].weight.data.copy_(per_expert.permute(1, 2, 0).flatten(1))
    delta = RULE.scale * per_expert @ down.unflatten(0, (EXPERTS, -1))
    torch.testing.assert_close(peft.get_delta_weight("default").detach(), delta)


@pytest.mark.parametrize("kind", ["lora", "steps", "both"])
def test_a_new_adapter_changes_no_expert(kind: str) -> None:
    experts = routed(dataclasses.replace(RULE, kind=kind), filled=False)
    for name in PROJECTIONS:
        stack = getattr(experts, name)
        base, deployed = stack.get_base_layer().base_blocks(), deployed_weight(stack)
        assert torch.equal(deployed.levels, base.levels)
        assert torch.equal(deployed.steps.view(torch.int16), base.steps.view(torch.int16))


def test_a_frozen_layer_keeps_no_weight_for_the_backward_pass() -> None:
    layer, saved = GridLinear("model.x", store_of(random_blocks(), on_grid=True)), []
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    y.sum().backward()
    weight = decode(layer.base_blocks())
    assert not saved
    assert torch.equal(y, torch.nn.functional.linear(x, weight))
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_experts"], indirect=True)
def test_a_model_with_adapters_is_its_own_teacher(tiny_multimodal_folder: Path) -> None:
    adapted = adapted_model(tiny_multimodal_folder, "bf16")
    plain = load_plain(tiny_multimodal_folder, torch.device("cpu"), torch.bfloat16)
    ids = torch.arange(4, 68)[None]
    with torch.no_grad():
        expected = plain(ids).logits
        with adapted.as_checkpoint():
            assert torch.equal(adapted.model(ids).logits, expected)
        assert not torch.equal(adapted.model(ids).logits, expected)


@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_experts"], indirect=True)
@pytest.mark.parametrize(("storage", "kind"), [("nf4", "lora"), ("q4_0", "steps")])
def test_a_loaded_adapter_deploys_what_was_deployed_when_it_was_saved(
    storage: str, kind: str, tiny_multimodal_folder: Path, tmp_path: Path
) -> None:
    first = adapted_model(tiny_multimodal_folder, storage, kind=kind)
    saved = save_adapter(first, tmp_path / "adapter")
    again, _ = load_adapter(loaded(tiny_multimodal_folder, storage), tmp_path / "adapter")
    assert again.deployed_digests() == saved.deployed
    stacks = [name for name, layer in again.layers() if isinstance(layer, StackAdapter)]
    assert len(stacks) == 4
    unmoved = dict(again.base_blocks())
    for name, blocks in again.deployed():
        part = "steps" if kind == "steps" else "levels"
        assert (getattr(blocks, part) != getattr(unmoved[name], part)).any(), name
        if name in stacks:  # every expert has its own share
            assert (blocks.levels.flatten(1) != 0).any(1).all()
    assert isinstance(again.base.model.get_submodule(stacks[0]).get_base_layer(), ExpertStack)
