"""What an inspection says of one tensor and of a checkpoint, against slow and obvious counts."""

import math
from pathlib import Path

import pytest
import torch
from loaded_cases import NUM_LINEARS, edit_tensors, on_grid_folder
from torch import Tensor

from qatlora.base.layout import find_layout
from qatlora.base.source import Source, find_source
from qatlora.config import BaseConfig
from qatlora.errors import CheckpointError, GridError
from qatlora.grid import decode, encode_reference, recover
from qatlora.inspection import tensors as inspection
from qatlora.inspection.tensors import inspect_checkpoint, inspect_tensor, require_weights

CPU = torch.device("cpu")


def source_and_names(folder: Path) -> tuple[Source, tuple[str, ...]]:
    settings = BaseConfig(path=str(folder), name="tiny")
    source = find_source(settings)
    return source, find_layout(source, settings).trained


def ordinary(rows: int = 32, width: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(rows, width, generator=generator) * 0.02).bfloat16()


def on_grid_with_peaks(peak_levels: list[int]) -> Tensor:
    """One block per peak level, bf16 steps of their own: [1, 32 * n]."""
    generator = torch.Generator().manual_seed(3)
    blocks = []
    for index, peak in enumerate(peak_levels):
        levels = torch.randint(-peak + 1, peak, (32,), generator=generator)
        levels[0], levels[1] = -peak, min(peak, 1)
        blocks.append(levels * torch.tensor(0.01 + 0.001 * index).bfloat16().float())
    return torch.cat(blocks).bfloat16().unsqueeze(0)


def test_peak_levels_of_on_grid_blocks_are_counted():
    weight = on_grid_with_peaks([8, 8, 7, 5, 3, 1, 1, 1])
    found = inspect_tensor("w", weight)
    assert found.on_grid_share == 1
    assert found.peak_levels == [3, 0, 1, 0, 1, 0, 1, 2]
    assert found.zero_blocks == 0
    assert found.error_ours == 0


def test_zero_blocks_are_on_the_grid_without_a_peak_level():
    weight = torch.cat([torch.zeros(1, 64).bfloat16(), on_grid_with_peaks([6])], dim=1)
    found = inspect_tensor("w", weight)
    assert (found.blocks, found.zero_blocks, found.on_grid_share) == (3, 2, 1.0)
    assert found.peak_levels == [0, 0, 0, 0, 0, 1, 0, 0]


def test_a_tensor_of_zeros_has_no_error():
    found = inspect_tensor("w", torch.zeros(2, 32))
    assert (found.error_reference, found.error_ours, found.reference_exact_share) == (0, 0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_errors_are_those_of_decoding_in_the_stored_type(dtype):
    weight = torch.cat([ordinary().to(dtype), on_grid_with_peaks([5] * 8).to(dtype)])
    found = inspect_tensor("w", weight)

    def error(blocks) -> float:
        residuals = decode(blocks, dtype).double() - weight.double()
        return math.sqrt((residuals**2).sum() / (weight.double() ** 2).sum())

    assert found.error_ours == pytest.approx(error(recover(weight).blocks), rel=1e-5)
    assert found.error_reference == pytest.approx(error(encode_reference(weight)), rel=1e-5)


def test_reference_exact_share_counts_the_blocks_that_llama_cpp_would_keep():
    kept = decode(encode_reference(ordinary()), torch.bfloat16)
    assert inspect_tensor("w", kept).reference_exact_share == 1
    moved = inspect_tensor("w", on_grid_with_peaks([5] * 16))
    assert moved.on_grid_share == 1
    assert moved.reference_exact_share == 0
    assert moved.error_reference > 0.03


def test_parts_of_a_tensor_sum_up_to_the_whole(monkeypatch):
    weight = torch.cat([ordinary(), on_grid_with_peaks([1, 2, 3, 4, 5, 6, 7, 8])])
    whole = inspect_tensor("w", weight)
    monkeypatch.setattr(inspection, "_PART_WEIGHTS", 3 * 256)
    parts = inspect_tensor("w", weight)
    assert parts.peak_levels == whole.peak_levels
    assert parts.on_grid_share == whole.on_grid_share
    assert parts.error_ours == pytest.approx(whole.error_ours, rel=1e-6)


def test_expert_tensors_are_inspected_as_rows():
    weight = on_grid_with_peaks([7] * 8).expand(4, 256).reshape(2, 2, 256)
    found = inspect_tensor("w", weight)
    assert (found.blocks, found.on_grid_share) == (32, 1)


def test_a_step_beyond_fp16_leaves_no_figure_for_the_reference():
    found = inspect_tensor("w", torch.full((1, 32), 1e7))
    assert found.error_reference is None
    assert math.isfinite(found.error_ours)


def test_a_weight_that_is_no_number_is_named():
    weight = torch.ones(1, 32)
    weight[0, 3] = float("nan")
    with pytest.raises(GridError, match=r"^layer\.7: .*not a number"):
        inspect_tensor("layer.7", weight)


def test_an_empty_tensor_is_refused():
    with pytest.raises(CheckpointError, match="empty"):
        inspect_tensor("w", torch.zeros(0, 32))


@pytest.mark.parametrize("layout", ["tiny_gemma3_folder", "tiny_llama_folder"])
def test_a_checkpoint_moved_onto_a_grid_is_found_there(layout, tmp_path, request):
    on_grid_folder(request.getfixturevalue(layout), tmp_path / "on")
    result = inspect_checkpoint(*source_and_names(tmp_path / "on"), CPU)
    assert (result.kind, result.on_grid_share, result.error_ours) == ("on_grid", 1, 0)
    assert len(result.tensors) == NUM_LINEARS
    assert result.stored_types == {"bfloat16": NUM_LINEARS}
    counted = sum(sum(tensor.peak_levels) + tensor.zero_blocks for tensor in result.tensors)
    assert counted == sum(tensor.blocks for tensor in result.tensors)


@pytest.mark.parametrize("layout", ["tiny_gemma3_folder", "tiny_llama_folder"])
def test_an_ordinary_checkpoint_is_off_the_grid_in_every_block(layout, request):
    result = inspect_checkpoint(*source_and_names(request.getfixturevalue(layout)), CPU)
    assert (result.kind, result.on_grid_share) == ("off_grid", 0)
    assert 0 < result.error_ours < result.error_reference


def test_one_ordinary_tensor_among_others_makes_it_partly_on_the_grid(tiny_llama_folder, tmp_path):
    on_grid_folder(tiny_llama_folder, tmp_path / "on")
    name = "model.layers.1.mlp.down_proj"
    edit_tensors(tmp_path / "on", {f"{name}.weight": ordinary(64, 160)})
    result = inspect_checkpoint(*source_and_names(tmp_path / "on"), CPU)
    assert result.kind == "partly"
    assert [tensor.name for tensor in result.tensors if tensor.on_grid_share < 1] == [name]


def test_only_one_tensor_is_held_at_a_time(tiny_llama_folder, monkeypatch):
    source, names = source_and_names(tiny_llama_folder)
    read = []
    original = Source.tensor
    monkeypatch.setattr(
        Source, "tensor", lambda self, name: read.append(name) or original(self, name)
    )
    seen = []
    inspect_checkpoint(source, names, CPU, lambda done: seen.append(len(read)))
    assert seen == list(range(1, NUM_LINEARS + 1))


def test_a_missing_weight_is_found_from_the_headers(tiny_llama_folder):
    source, names = source_and_names(tiny_llama_folder)
    del source.files["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        require_weights(source, names)
