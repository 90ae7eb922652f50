"""Compiled kernels of the deployed weight against eager, and a user's torch.compile around it."""

import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch
from adapter_cases import RULE, adapter
from loaded_cases import adapted_model
from peft import LoraConfig
from store_cases import store_of
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qatlora.adapters.deployed import changed_steps, deployed_weight
from qatlora.adapters.layer import GridAdapter
from qatlora.base import stores
from qatlora.base.linear import GridLinear
from qatlora.grid import Q4Blocks, decode
from qatlora.grid.fused import VARIABLE

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(24, 128), (7, 320)]


@pytest.fixture
def compile_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile everywhere, and let no kernel fall back to eager unnoticed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*computed by single operators")
        monkeypatch.setenv(VARIABLE, "always")
        yield


def weight_of(shape: tuple[int, int], device: str, *, on_grid: bool) -> Tensor:
    """A bf16 weight with steps from fp16's smallest to its large ones, and a zero block."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(-8, 8, shape, generator=generator).to(torch.int8)
    levels[:, ::32] = -8
    exponents = torch.randint(-24, 8, (shape[0], shape[1] // 32), generator=generator)
    steps = torch.exp2(exponents.float()).half()
    steps[1, 1] = 0
    weight = decode(Q4Blocks(steps, levels))
    if not on_grid:
        weight *= 1 + 0.3 * torch.rand(shape, generator=generator)
    return weight.bfloat16().to(device)


def layer_of(
    kind: str, storage: str, shape: tuple[int, int], device: str, *, on_grid: bool, dither: str
) -> GridAdapter:
    """An adapter whose deltas are of the order of each block's step."""
    rule = dataclasses.replace(RULE, kind=kind, dither=dither)
    store = store_of(storage, weight_of(shape, device, on_grid=on_grid))
    torch.manual_seed(1)
    layer = GridAdapter(GridLinear("model.x", store), "default", LoraConfig(), rule=rule)
    for name in ("lora_A", "lora_B", "lora_steps_A", "lora_steps_B"):
        parameters = layer.parameters_of(name)
        if parameters is not None:
            nn.init.normal_(parameters, std=4.0 if "steps" in name else 0.05)
    return layer


def same_bits(found: Q4Blocks, expected: Q4Blocks) -> bool:
    return torch.equal(found.levels, expected.levels) and torch.equal(
        found.steps.view(torch.int16), expected.steps.view(torch.int16)
    )


CASES = [
    ("lora", "q4_0", True, "auto"),
    ("lora", "q4_0", True, "never"),
    ("lora", "bf16", True, "auto"),
    ("lora", "bf16", False, "auto"),
    ("lora", "nf4", False, "always"),
    ("both", "q4_0", True, "auto"),
    ("both", "nf4", True, "auto"),
    ("steps", "q4_0", True, "auto"),
    ("steps", "bf16", False, "auto"),
    ("steps", "nf4", True, "auto"),
]


@pytest.mark.usefixtures("compile_kernels")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "storage", "on_grid", "dither"), CASES)
def test_compiled_blocks_are_eagers_blocks(
    kind: str,
    storage: str,
    on_grid: bool,
    dither: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counters.clear()
    for shape in SHAPES:
        layer = layer_of(kind, storage, shape, device, on_grid=on_grid, dither=dither)
        found = deployed_weight(layer)
        base = layer.get_base_layer().base_blocks()
        with monkeypatch.context() as eager:
            eager.setenv(VARIABLE, "never")
            assert same_bits(found, deployed_weight(layer))
            assert same_bits(base, layer.get_base_layer().base_blocks())
        assert not same_bits(found, base)
    assert not counters["graph_break"]


@pytest.mark.usefixtures("compile_kernels")
def test_tiles_of_any_height_do_not_show_in_compiled_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = layer_of("lora", "q4_0", (7, 320), "cpu", on_grid=True, dither="auto")
    whole = deployed_weight(layer)
    monkeypatch.setitem(stores._TILE_WEIGHTS, "cpu", 3 * 320)  # 3, 3 and 1 rows
    assert same_bits(deployed_weight(layer), whole)


@pytest.mark.usefixtures("compile_kernels")
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_steps_keep_the_rounding_of_fp16(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that vanish, become subnormal, or overflow among them."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).to(device)
    steps = patterns.view(torch.float16)
    steps = steps[steps.isfinite()].view(-1, 32)
    torch.manual_seed(0)
    for size in (1e-4, 1.0, 1e4):
        change = size * torch.randn(steps.shape, device=device)
        found = changed_steps(steps, change)
        with monkeypatch.context() as eager:
            eager.setenv(VARIABLE, "never")
            expected = changed_steps(steps, change)
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
        assert expected.isfinite().all()


class Pair(nn.Module):
    """Two adapted layers of different kinds with something between them that can be compiled."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.first = adapter(dataclasses.replace(RULE, kind="both"))
        self.second = adapter(dataclasses.replace(RULE, kind="steps"), on_grid=False)
        self.checkpointed = checkpointed

    def between(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.first(x))
        return self.second(y.repeat(1, 16) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self.between(x).square().mean()
        y = torch.utils.checkpoint.checkpoint(self.between, x, use_reentrant=False)
        return y.square().mean()


def loss_and_gradients(model: nn.Module, compiled: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    loss = compiled(x)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.usefixtures("compile_kernels")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_users_compile_around_adapted_layers_trains_as_eager_does(
    checkpointed: bool, device: str
) -> None:
    model = Pair(checkpointed=checkpointed).to(device)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2)).to(device)
    expected = loss_and_gradients(model, model, x)
    compiled = torch.compile(model)
    for found, value in zip(loss_and_gradients(model, compiled, x), expected, strict=True):
        assert (found - value).abs().max() <= 1e-5 * value.abs().max()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_users_compile_of_a_language_model_changes_no_code_and_no_loss(
    checkpointed: bool, tiny_llama_folder: object
) -> None:
    adapted = adapted_model(tiny_llama_folder, kind="both")
    model, ids = adapted.model.float().train(), torch.arange(20, 52)[None]
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for runs in (model, compiled):
        model.zero_grad()
        loss = runs(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        results.append((loss.detach(), grads, adapted.deployed_digests()))
    (loss, grads, digests), (found_loss, found_grads, found_digests) = results
    assert found_digests == digests
    assert abs(found_loss - loss) <= 1e-6 * loss
    for found, grad in zip(found_grads, grads, strict=True):
        assert (found - grad).abs().max() <= 1e-5 * grad.abs().max()


def test_a_graph_without_breaks_is_refused_with_the_reason() -> None:
    whole = torch.compile(adapter(RULE), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="would lose their rounding"):
        whole(torch.randn(2, 96))
