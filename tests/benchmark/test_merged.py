"""The baselines: PEFT's own LoRA, and what a merge through llama.cpp makes of it."""

from pathlib import Path

import pytest
import torch
from loaded_cases import on_grid_folder
from peft.tuners.lora.bnb import Linear4bit

from qatlora.base.layout import find_layout
from qatlora.base.source import find_source
from qatlora.benchmark.build import Ground, build
from qatlora.benchmark.merged import merged_blocks, quantized_model
from qatlora.benchmark.methods import METHODS
from qatlora.benchmark.plain_peft import PlainPeft
from qatlora.config import AdapterConfig, BaseConfig, BenchmarkMethod
from qatlora.grid import decode, encode_reference


def built(folder: Path, method: str) -> tuple[PlainPeft, Ground]:
    base = BaseConfig(path=str(folder), name="tiny")
    source = find_source(base)
    adapter = AdapterConfig(rank=4, alpha=6.0)
    ground = Ground(
        source, find_layout(source, base), adapter, "q8_0", torch.device("cpu"), torch.bfloat16
    )
    adapted = build(METHODS[BenchmarkMethod[method]], ground, seed=1)
    assert isinstance(adapted, PlainPeft)
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted, ground


def test_on_nf4_it_is_pefts_own_4_bit_layer_with_float32_factors(tiny_llama_folder: Path) -> None:
    adapted, ground = built(tiny_llama_folder, "peft_nf4")
    inner = adapted.model.get_base_model()
    for name in ground.layout.trained:
        layer = inner.get_submodule(name)
        assert isinstance(layer, Linear4bit)
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert layer.scaling["default"] == 1.5
    names = {n for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * len(ground.layout.trained)


def test_the_delta_is_what_peft_itself_would_merge(tiny_llama_folder: Path) -> None:
    adapted, ground = built(tiny_llama_folder, "peft_bf16")
    name = ground.layout.trained[0]
    layer = adapted.model.get_base_model().get_submodule(name)
    torch.testing.assert_close(adapted.deltas()[name], layer.get_delta_weight("default").float())


@pytest.mark.llama_cpp
def test_the_merged_model_is_llama_cpps_rule_on_the_merged_weights(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    on_grid_folder(tiny_llama_folder, tmp_path / "grid")
    adapted, ground = built(tmp_path / "grid", "peft_bf16")
    model = quantized_model(adapted, ground)
    blocks = merged_blocks(adapted, ground.source)
    for name in ground.layout.trained:
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, decode(blocks[name], torch.bfloat16)), name
        before = encode_reference(ground.source.tensor(f"{name}.weight"))
        assert not torch.equal(blocks[name].levels, before.levels)
