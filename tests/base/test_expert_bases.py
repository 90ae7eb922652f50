"""A base with experts: its builds, and what stays where."""

from pathlib import Path

import pytest
import torch
from loaded_cases import built_folder, loaded
from safetensors.torch import load_file
from store_cases import store_of

from qatlora.base.experts import ExpertStack
from qatlora.base.load import LoadedBase, load_plain
from qatlora.base.names import weight_key
from qatlora.base.nf4 import dequantized_nf4, quantized_nf4
from qatlora.base.stores import Nf4Store, Q4Store
from qatlora.grid import decode, digest

pytestmark = pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_experts"], indirect=True)
NUM_STACKS, NUM_EXPERTS = 4, 5


def stacks(base: LoadedBase) -> dict[str, ExpertStack]:
    layers = {name: base.model.get_submodule(name) for name in base.grid}
    return {name: layer for name, layer in layers.items() if isinstance(layer, ExpertStack)}


def test_a_packed_build_is_the_base_that_its_source_is(
    tiny_multimodal_folder: Path, tmp_path: Path
):
    built_folder(tiny_multimodal_folder, tmp_path / "packed", "q4_0")
    original, build = loaded(tiny_multimodal_folder), loaded(tmp_path / "packed")
    unpacked = loaded(tmp_path / "packed", "bf16")
    plain = load_plain(tmp_path / "packed", torch.device("cpu"), torch.float32)
    assert build.digest == original.digest
    found = stacks(build)
    assert len(found) == NUM_STACKS
    for name, stack in found.items():
        assert [type(linear.store) for linear in stack.linears()] == [Q4Store] * NUM_EXPERTS
        blocks = stack.base_blocks()
        assert digest(stacks(unpacked)[name].base_blocks()) == digest(blocks)
        assert torch.equal(plain.get_parameter(weight_key(name)), decode(blocks))


def test_an_nf4_build_has_its_experts_in_bf16_and_their_steps_beside_them(
    tiny_multimodal_folder: Path, tmp_path: Path
):
    built_folder(tiny_multimodal_folder, tmp_path / "nf4", "nf4")
    original, build = (loaded(f, "nf4") for f in (tiny_multimodal_folder, tmp_path / "nf4"))
    assert build.digest == original.digest
    before = load_file(tiny_multimodal_folder / "model.safetensors")
    after = load_file(tmp_path / "nf4" / "model.safetensors")
    steps = load_file(tmp_path / "nf4" / "q4_0_steps.safetensors")
    for name, stack in stacks(build).items():
        assert [type(linear.store) for linear in stack.linears()] == [Nf4Store] * NUM_EXPERTS
        assert torch.equal(after[name], before[name])
        assert torch.equal(steps[f"{name}.steps"], stack.base_blocks().steps)


def test_an_expert_becomes_the_nf4_that_a_linear_of_its_values_becomes(
    tiny_multimodal_folder: Path,
):
    tensors = load_file(tiny_multimodal_folder / "model.safetensors")
    matrix = tensors["model.language_model.layers.0.experts.gate_up_proj"][1]
    as_linear = dequantized_nf4(store_of("nf4", matrix).weight)
    assert torch.equal(dequantized_nf4(quantized_nf4(matrix)), as_linear.bfloat16())
