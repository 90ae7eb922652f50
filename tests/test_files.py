"""Files that get their name: whole, and open to whom the umask says."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qatlora.files import replacing, replacing_folder


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> int:
    """The process's umask, set for one test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def as_one_file(path: Path) -> None:
    with replacing(path) as partial:
        save_file({"w": torch.ones(1)}, partial)


def in_a_folder(path: Path) -> None:
    with replacing_folder(path.parent) as partial:
        (partial / "below").mkdir()
        save_file({"w": torch.ones(1)}, partial / path.name)
        save_file({"w": torch.ones(1)}, partial / "below" / path.name)


@pytest.mark.parametrize("write", [as_one_file, in_a_folder])
def test_a_safetensors_file_has_the_mode_of_any_new_file(
    write: Callable[[Path], None], umask: int, tmp_path: Path
) -> None:
    write(tmp_path / "out" / "model.safetensors")
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "other").stat().st_mode}


def test_a_program_can_still_be_executed(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "tools") as partial:
        (partial / "llama-cli").touch(0o700)
    assert os.access(tmp_path / "tools" / "llama-cli", os.X_OK)
