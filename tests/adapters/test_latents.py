"""Weights trained inside the grid: the blocks they deploy, and their gradient."""

from pathlib import Path

import pytest
import torch
from adapter_cases import IN, OUT, random_blocks
from loaded_cases import NUM_LINEARS, loaded
from torch import Tensor

from qatlora.adapters.deployed import LatentRule, deployed_dense, deployed_weight
from qatlora.adapters.latent_layer import LatentLinear
from qatlora.adapters.latents import LatentModel, attach_latents
from qatlora.base.linear import GridLinear
from qatlora.base.names import is_stack
from qatlora.base.stores import Bf16Store
from qatlora.errors import AdapterError
from qatlora.grid import decode, digest, encode_reference, nearest_levels
from qatlora.grid.format import latents, pack

RULES = ["frozen", "recomputed", "learned"]


def latent_layer(
    steps: str, *, moved: bool = True, dtype: torch.dtype = torch.float32
) -> LatentLinear:
    """A layer off its grid with one dead block; `moved`: after some training."""
    blocks = random_blocks()
    weight = decode(blocks) + 0.3 * blocks.steps.float().repeat_interleave(32, 1)
    store = Bf16Store(weight.bfloat16(), blocks.steps, on_grid=False)
    layer = LatentLinear(GridLinear("model.x", store), store.weight, LatentRule(steps), dtype)
    if moved:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            layer.latent += 0.01 * torch.randn(OUT, IN, generator=generator)
            if layer.step_change is not None:
                layer.step_change += 0.1 * torch.randn(OUT, IN // 32, generator=generator)
    return layer


def dense_surrogate(layer: LatentLinear, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """All gradients in float64 by autograd through a surrogate with rounding as the identity."""
    blocks = deployed_weight(layer)
    levels = blocks.levels.double().unflatten(1, (-1, 32))
    alive = (layer.steps != 0).double().unsqueeze(-1)
    steps = layer.steps.double().unsqueeze(-1)
    latent = layer.latent.detach().double().requires_grad_()
    x = x.double().requires_grad_()
    if layer.rule.steps == "recomputed":
        dense = decode(blocks, torch.float64)
        weight = dense + latent - latent.detach()
        change = None
    else:
        # level + the latent's movement in steps, times the deployed step moved by the change.
        moved = (latent - latent.detach()).unflatten(1, (-1, 32)) / torch.where(
            steps == 0, 1, steps
        )
        deployed_steps = blocks.steps.double().unsqueeze(-1)
        change = torch.zeros(steps.shape, dtype=torch.float64, requires_grad=True)
        weight = ((levels + moved * alive) * (deployed_steps + steps * change)).flatten(1)
    (x @ weight.T).backward(grad_y.double())
    grads = {"x": x.grad, "latent": latent.grad}
    if layer.step_change is not None:
        assert change is not None
        grads["step_change"] = change.grad.squeeze(-1)
    return {name: grad for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("keeps_blocks", [True, False])
@pytest.mark.parametrize("steps", RULES)
def test_gradients_equal_the_dense_surrogate(steps: str, keeps_blocks: bool) -> None:
    layer = latent_layer(steps)
    layer.keeps_blocks = keeps_blocks
    torch.manual_seed(3)
    x, grad_y = torch.randn(5, IN), torch.randn(5, OUT)
    expected = dense_surrogate(layer, x, grad_y)
    inputs = x.clone().requires_grad_()
    layer(inputs.view(1, 5, IN)).backward(grad_y.view(1, 5, OUT))
    found = {"x": inputs.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad is not None
        assert grad.dtype == torch.float32
        scale = expected[name].abs().max()
        assert (grad.double() - expected[name]).abs().max() <= 2e-6 * scale, name


def test_bf16_products_give_float32_gradients_within_their_rounding() -> None:
    layer = latent_layer("learned")
    torch.manual_seed(3)
    x, grad_y = torch.randn(64, IN).bfloat16(), torch.randn(64, OUT).bfloat16()
    expected = dense_surrogate(layer, x, grad_y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.backward(grad_y)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad.double() - expected[name]).abs().max()
        assert error <= 2**-7 * expected[name].abs().max(), name


@pytest.mark.parametrize("steps", RULES)
def test_a_latent_in_bf16_is_the_float32_one_of_its_value(steps: str) -> None:
    narrow, wide = latent_layer(steps, dtype=torch.bfloat16), latent_layer(steps)
    wide.latent.data = narrow.latent.detach().float()
    assert torch.equal(pack(deployed_weight(narrow)), pack(deployed_weight(wide)))
    for layer in (narrow, wide):
        torch.manual_seed(3)
        layer(torch.randn(5, IN)).square().sum().backward()
    for parameter, expected in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert torch.equal(parameter.grad, expected.grad.to(parameter.dtype))


@pytest.mark.parametrize("steps", RULES)
def test_the_forward_multiplies_by_the_deployed_weight(steps: str) -> None:
    layer = latent_layer(steps)
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), x @ deployed_dense(layer, torch.float32).T)
    layer.held_weight = torch.zeros(OUT, IN)
    assert layer(x).abs().max() > 0  # a held weight serves forwards without gradients only
    with torch.no_grad():
        assert layer(x).abs().max() == 0


def test_each_rule_deploys_what_it_says() -> None:
    frozen, again, learned = (latent_layer(steps) for steps in RULES)
    blocks = deployed_weight(frozen)
    assert torch.equal(blocks.steps, frozen.steps)
    assert torch.equal(blocks.levels, nearest_levels(latents(frozen.latent, frozen.steps)))
    reference = encode_reference(again.latent)
    assert torch.equal(pack(deployed_weight(again)), pack(reference))
    moved = deployed_weight(learned)
    assert torch.equal(moved.levels, nearest_levels(latents(learned.latent, learned.steps)))
    assert learned.step_change is not None
    expected = (learned.steps.float() * (1 + learned.step_change)).half()
    assert torch.equal(moved.steps, expected)
    assert (moved.steps != learned.steps).any()


@pytest.mark.parametrize("steps", ["frozen", "learned"])
def test_a_decoded_level_comes_back_from_every_step(steps: str) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 8, (512, 4), generator=generator)
    values = torch.rand(512, 4, generator=generator).add(1).ldexp(exponents).half()
    levels = torch.randint(-8, 8, (512, 128), generator=generator).to(torch.int8)
    weight = (levels.unflatten(1, (-1, 32)) * values.float().unsqueeze(-1)).flatten(1)
    store = Bf16Store(weight, values, on_grid=True)
    layer = LatentLinear(GridLinear("model.x", store), weight, LatentRule(steps))
    assert torch.equal(deployed_weight(layer).levels, levels)


@pytest.mark.parametrize("steps", RULES)
def test_before_training_the_model_is_its_base_and_as_base_returns_there(
    steps: str, tiny_llama_folder: Path
) -> None:
    model = attach_latents(loaded(tiny_llama_folder, "bf16"), LatentRule(steps))
    start = {name: decode(blocks, torch.bfloat16) for name, blocks in model.base_blocks()}
    assert all(torch.equal(decode(b, torch.bfloat16), start[n]) for n, b in model.deployed())
    train_a_little(model)
    with model.as_base():
        inside = model.deployed_digests()
    model.settle()
    after = model.deployed_digests()
    assert all(inside[name] != after[name] for name in after)
    with model.as_base():
        assert model.deployed_digests() == inside


@pytest.mark.parametrize("steps", RULES)
def test_settling_keeps_every_bf16_value_and_later_updates_out(
    steps: str, tiny_gemma3_folder: Path
) -> None:
    model = attach_latents(loaded(tiny_gemma3_folder, "bf16"), LatentRule(steps))
    train_a_little(model)
    before = {name: decode(blocks, torch.bfloat16) for name, blocks in model.deployed()}
    model.settle()
    digests = model.deployed_digests()
    assert all(torch.equal(decode(b, torch.bfloat16), before[n]) for n, b in model.deployed())
    train_a_little(model)
    assert model.deployed_digests() == digests


def test_all_latents_train_and_nothing_else(tiny_llama_folder: Path) -> None:
    base = loaded(tiny_llama_folder, "bf16")
    model = attach_latents(base, LatentRule("learned"))
    groups = model.parameter_groups()
    assert len(groups.levels) == len(groups.steps) == NUM_LINEARS
    trained = {id(parameter) for parameter in [*groups.levels, *groups.steps]}
    assert {id(p) for p in model.model.parameters() if p.requires_grad} == trained
    assert model.num_trainable == sum(p.numel() for p in [*groups.levels, *groups.steps])


def test_the_rate_is_a_share_of_a_level_of_this_base(tiny_llama_folder: Path) -> None:
    model = attach_latents(loaded(tiny_llama_folder, "bf16"), LatentRule("frozen"))
    all_steps = torch.cat([layer.steps.abs().float().flatten() for layer in model.trained_layers()])
    assert model.parameter_groups().level_size == pytest.approx(all_steps.median().item(), rel=0.2)


def test_a_selection_of_layers_leaves_the_others_as_they_are(tiny_llama_folder: Path) -> None:
    base = loaded(tiny_llama_folder, "bf16", trained=[r"model\.layers\.0\.mlp\..*_proj"])
    model = attach_latents(base, LatentRule("frozen"))
    assert len(list(model.trained_layers())) == 3
    assert len(list(model.deployed())) == NUM_LINEARS


@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_experts"], indirect=True)
def test_every_expert_trains_as_a_layer_of_its_own(tiny_multimodal_folder: Path) -> None:
    base = loaded(tiny_multimodal_folder, "bf16")
    stacks = [name for name in base.trained if is_stack(name)]
    model = attach_latents(base, LatentRule("frozen"))
    num_experts = sum(len(base.model.get_submodule(name).experts) for name in stacks)
    assert num_experts == 4 * 5
    assert len(model.trained_layers()) == len(base.trained) - len(stacks) + num_experts
    before = dict(model.base_blocks())
    model.model(torch.arange(4, 68)[None]).logits.square().mean().backward()
    assert all(layer.latent.grad is not None for layer in model.trained_layers())
    train_a_little(model)
    with model.as_base():
        assert model.deployed_digests() == {name: digest(one) for name, one in before.items()}
    after = dict(model.deployed())
    for name in stacks:
        assert (after[name].levels != before[name].levels).flatten(1).any(1).all()


@pytest.mark.parametrize("storage", ["q4_0", "nf4"])
def test_a_base_without_its_own_values_is_refused(storage: str, tiny_llama_folder: Path) -> None:
    with pytest.raises(AdapterError, match="Use storage=bf16"):
        attach_latents(loaded(tiny_llama_folder, storage), LatentRule("frozen"))


def train_a_little(model: LatentModel) -> None:
    """A random movement as large as a few updates."""
    generator = torch.Generator().manual_seed(9)
    groups = model.parameter_groups()
    with torch.no_grad():
        for parameter in [*groups.levels, *groups.steps]:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
