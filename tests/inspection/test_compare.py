"""Two checkpoints: what an edit changed and took off the grid, and what cannot be compared."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from loaded_cases import edit_tensors, edited_folder, on_grid_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatlora.base.layout import find_layout
from qatlora.base.source import Source, find_source
from qatlora.config import BaseConfig
from qatlora.errors import CheckpointError, GridError
from qatlora.inspection.compare import compare_checkpoints, compare_tensors, require_comparable
from qatlora.report.results_inspect import Comparison

CPU = torch.device("cpu")
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def source(folder: Path) -> Source:
    return find_source(BaseConfig(path=str(folder), name="tiny"))


def compared(after: Path, before: Path) -> Comparison:
    sources = source(after), source(before)
    require_comparable(*sources)
    layout = find_layout(sources[0], BaseConfig(path=str(after)))
    return compare_checkpoints(*sources, layout.trained, CPU)


def without_direction(weight: Tensor) -> Tensor:
    """What an "abliteration" does: the part of every column along one direction is removed."""
    direction = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    wide = weight.float()
    return (wide - torch.outer(direction, direction @ wide)).bfloat16()


@pytest.fixture
def pair(tiny_llama_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint on a grid and a copy to edit."""
    on_grid_folder(tiny_llama_folder, tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    return tmp_path / "before", tmp_path / "after"


def test_equal_checkpoints_have_no_edits(pair):
    before, after = pair
    result = compared(after, before)
    assert (result.edits, result.stray, result.missing) == ([], [], [])
    assert result.tensors == len(source(before).files)
    assert result.against == str(before)


def test_an_abliterated_tensor_is_found_off_the_grid(pair):
    before, after = pair
    weight = load_file(before / "model.safetensors")[O_PROJ]
    edit_tensors(after, {O_PROJ: without_direction(weight)})
    (edit,) = compared(after, before).edits
    assert edit.name == O_PROJ
    assert edit.on_grid_before == 1
    assert edit.on_grid_after == 0
    assert edit.blocks_off_grid == weight.numel() // 32
    assert edit.changed_share > 0.9
    change = (without_direction(weight).double() - weight.double()).norm()
    assert edit.relative_size == pytest.approx((change / weight.double().norm()).item(), rel=1e-5)


def test_an_edit_of_one_row_takes_only_its_blocks_off(pair):
    before, after = pair
    weight = load_file(before / "model.safetensors")[O_PROJ]
    edited = weight.clone()
    edited[5] = without_direction(weight)[5]
    edit_tensors(after, {O_PROJ: edited})
    (edit,) = compared(after, before).edits
    assert edit.blocks_off_grid == weight.shape[1] // 32
    assert edit.on_grid_after == pytest.approx(1 - 1 / weight.shape[0])


def test_a_tensor_outside_the_trained_list_has_no_grid_figures(pair):
    before, after = pair
    name = "model.norm.weight"
    norm = load_file(before / "model.safetensors")[name]
    edit_tensors(after, {name: norm * 2})
    (edit,) = compared(after, before).edits
    assert edit.name == name
    assert (edit.on_grid_before, edit.on_grid_after, edit.blocks_off_grid) == (None, None, None)
    assert (edit.changed_share, edit.relative_size) == (1, 1)


def test_the_same_values_in_a_wider_type_are_unchanged(pair):
    before, after = pair
    tensors = load_file(before / "model.safetensors")
    edit_tensors(after, {name: tensor.float() for name, tensor in tensors.items()})
    assert compared(after, before).edits == []


def test_a_stray_lm_head_and_a_missing_tensor_are_named(tiny_gemma3_folder, tmp_path):
    shutil.copytree(tiny_gemma3_folder, tmp_path / "after")
    path = tmp_path / "after" / "model.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    result = compared(tmp_path / "after", tiny_gemma3_folder)
    assert norm.ndim == 1
    assert result.stray == ["lm_head.weight"]
    assert result.missing == ["model.norm.weight"]
    assert result.tensors == len(tensors) - 1


def test_an_edit_of_zeros_has_no_relative_size():
    edit = compare_tensors("w", torch.zeros(1, 32), torch.ones(1, 32), CPU, grid=True)
    assert edit.relative_size is None
    assert (edit.on_grid_before, edit.on_grid_after, edit.blocks_off_grid) == (1, 1, 0)


def test_zeros_of_either_sign_are_equal():
    assert compare_tensors("w", torch.tensor([0.0]), torch.tensor([-0.0]), CPU, grid=False) is None


def test_a_weight_that_is_no_number_is_named():
    bad = torch.full((1, 32), float("inf"))
    with pytest.raises(GridError, match="^some.weight: "):
        compare_tensors("some.weight", bad, torch.ones(1, 32), CPU, grid=True)


def test_another_architecture_is_refused(tiny_gemma3_folder, tiny_llama_folder):
    with pytest.raises(CheckpointError, match="'gemma3_text'.*'llama'"):
        require_comparable(source(tiny_gemma3_folder), source(tiny_llama_folder))


def test_other_shapes_are_refused(pair):
    before, after = pair
    edit_tensors(after, {"model.embed_tokens.weight": torch.zeros(7, 64).bfloat16()})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is \(7, 64\) against"):
        require_comparable(source(after), source(before))


def test_no_common_name_is_refused(pair):
    before, after = pair
    path = after / "model.safetensors"
    renamed = {f"other.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no tensor name in common"):
        require_comparable(source(after), source(before))


def test_an_nf4_build_is_refused(pair):
    before, after = pair
    build = dataclasses.replace(source(before), nf4_modules=frozenset({"model.layers.0.a"}))
    with pytest.raises(CheckpointError, match="NF4 keeps no Q4_0 grid"):
        require_comparable(source(after), build)


def test_another_setting_of_one_architecture_is_no_obstacle(pair, tmp_path):
    before, _ = pair
    edited = edited_folder(before, tmp_path / "renamed", rope_theta=5e5)
    assert json.loads((edited / "config.json").read_text())["rope_theta"] == 5e5
    assert compared(edited, before).edits == []
