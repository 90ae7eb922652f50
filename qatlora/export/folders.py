"""The files of a HF folder besides its weights: configuration, tokenizer, template."""

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from qatlora.base.record import RECORD
from qatlora.files import SUMS

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_OF_THIS_FOLDER = ("config.json", RECORD, SUMS)
"""What a changed copy of the weights makes untrue."""


def side_files(folder: Path) -> Iterator[Path]:
    """Files that are neither weights nor their index, and stay true where these are changed."""
    for path in sorted(folder.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in _OF_THIS_FOLDER:
            yield path


def copy_side_files(folder: Path, target: Path, besides: Collection[str] = ()) -> None:
    """Copy them, without the names in `besides`; links become files."""
    for path in side_files(folder):
        if path.name not in besides:
            shutil.copy2(path, target / path.name)
