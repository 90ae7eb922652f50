"""A whole checkpoint as a bf16 GGUF, with no block of ours: what llama-quantize starts from.

The naive ways to Q4_0 that qatlora is compared with begin here.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from qatlora import files
from qatlora.base.source import Source
from qatlora.export.folders import copy_side_files
from qatlora.llamacpp.convert import convert

_HEAD = "lm_head.weight"
_METADATA = {"format": "pt"}

Change = Callable[[str, Tensor], Tensor]
"""Name in the model and stored tensor -> the tensor to write."""


def write_plain_gguf(
    source: Source, tied: bool, target: Path, change: Change | None = None
) -> None:
    """Convert the checkpoint; large files are linked, not copied, where nothing in them changes.

    Args:
        source: an unquantized checkpoint.
        tied: whether its embeddings are its head; a stray head is left out then.
        target: the GGUF, written in place.
        change: applied to every tensor, None for the checkpoint as it is.

    Raises:
        ExportError, ToolError: llama.cpp's converter failed or is missing.
    """
    with tempfile.TemporaryDirectory(prefix=".plain-", dir=target.parent) as folder:
        staging = Path(folder)
        copy_side_files(source.folder, staging)
        files.write_json(staging / "config.json", source.config)
        for path in sorted(set(source.files.values())):
            stray = tied and source.files.get(_HEAD) == path
            if change is None and not stray:
                (staging / path.name).symlink_to(path.resolve())
            else:
                save_file(_tensors(path, source, tied, change), staging / path.name, _METADATA)
        convert(staging, target, "bf16", {"general.name": source.name})


def _tensors(path: Path, source: Source, tied: bool, change: Change | None) -> dict[str, Tensor]:
    kept = {}
    for key, tensor in load_file(path).items():
        name = source.model_name(key)
        if not (tied and name == _HEAD):
            kept[key] = change(name, tensor) if change else tensor
    return kept
