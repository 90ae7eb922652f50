from pathlib import Path

import pytest
import torch
from loaded_cases import on_grid_folder
from safetensors.torch import load_file

from qatlora.base.layout import find_layout
from qatlora.base.on_grid import on_grid_share, rounded_folder
from qatlora.base.source import find_source
from qatlora.config import BaseConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("by", ["search", "reference"])
def test_a_rounded_checkpoint_lies_on_the_grid_and_keeps_all_else(
    by: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    source = find_source(BaseConfig(path=str(tiny_llama_folder)))
    layout = find_layout(source, BaseConfig())
    assert on_grid_share(source, layout, CPU) == 0
    folder = rounded_folder(source, layout, by, CPU, tmp_path)
    rounded = find_source(BaseConfig(path=str(folder)))
    assert on_grid_share(rounded, layout, CPU) == 1
    before = load_file(tiny_llama_folder / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {f"{name}.weight" for name in layout.grid}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in moved), name
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in tiny_llama_folder.iterdir()
    }


def test_it_is_rounded_once(tiny_llama_folder: Path, tmp_path: Path) -> None:
    source = find_source(BaseConfig(path=str(tiny_llama_folder)))
    layout = find_layout(source, BaseConfig())
    first = rounded_folder(source, layout, "search", CPU, tmp_path)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert rounded_folder(source, layout, "search", CPU, tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert rounded_folder(source, layout, "reference", CPU, tmp_path) != first


def test_a_checkpoint_on_a_grid_is_recognized(tiny_llama_folder: Path, tmp_path: Path) -> None:
    on_grid_folder(tiny_llama_folder, tmp_path / "grid")
    source = find_source(BaseConfig(path=str(tmp_path / "grid")))
    assert on_grid_share(source, find_layout(source, BaseConfig()), CPU) == 1
