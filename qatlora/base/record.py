"""`grid.json`: what a built folder remembers of its source's grid, and the check that it is whole.

A build is an HF folder in which the Q4_0 linears are not bf16 any more. Two kinds exist:

    q4_0    `NAME.weight` holds Q4_0 rows as a GGUF holds them, uint8 [out, in / 32 * 18], and a
            stack of experts [experts, out, in / 32 * 18]. Plain transformers refuses the folder:
            the shape is wrong and the quant_method is unknown.
    nf4     the public bitsandbytes layout, which plain transformers loads; beside it, in a file
            that transformers does not read, `NAME.steps`, float16 [out, in / 32], from the source.

`grid.json` says where it came from, which blocks lay on a grid, and the digest that the base has
when it is loaded, so that a damaged tensor is found and adapters move between build and source.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qatlora.base.names import is_stack, weight_key
from qatlora.errors import CheckpointError
from qatlora.grid import BLOCK_BYTES, GRID_VERSION

QUANT_METHOD = "qatlora_q4_0"
"""`quantization_config.quant_method` of a packed build's config.json; nobody else knows it."""
STEPS_FILE = "q4_0_steps.safetensors"
RECORD = "grid.json"


@dataclass(frozen=True)
class GridRecord:
    """The content of `grid.json`.

    Attributes:
        grid_version: version of the numerics that found steps and levels.
        storage: q4_0 or nf4.
        source_name: how people call the checkpoint that it was built from.
        source_digest: hex SHA-256 over all tensors of that checkpoint (`digest_of_tensors`).
        base_digest: `LoadedBase.digest` of this folder in its own storage.
        relative_error: of what is stored against the source, sqrt(sum of squares / sum of squares)
            over the modules in `blocks`.
        blocks: module -> number of its blocks of 32.
        on_grid_blocks: module -> how many of them lie on a grid in the source.
    """

    grid_version: int
    storage: str
    source_name: str
    source_digest: str
    base_digest: str
    relative_error: float
    blocks: dict[str, int]
    on_grid_blocks: dict[str, int]

    @property
    def on_grid_share(self) -> float:
        """Share of all blocks that lie on a grid in the source."""
        return sum(self.on_grid_blocks.values()) / sum(self.blocks.values())

    def write(self, folder: Path) -> None:
        """Write `grid.json` into a folder that is not published yet."""
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def is_packed(folder: Path) -> bool:
    """Whether config.json in `folder`, if there is one, is that of a packed Q4_0 build."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _quant_method(config) == QUANT_METHOD
    except (OSError, ValueError, AttributeError):
        return False  # no folder of ours; whoever loads it will say what is wrong with it


def _quant_method(config: Mapping[str, Any]) -> str | None:
    return (config.get("quantization_config") or {}).get("quant_method")


def read_record(folder: Path, config: Mapping[str, Any]) -> GridRecord | None:
    """Read the record of a built folder; None for a checkpoint that is no build of ours.

    Raises:
        CheckpointError: config.json speaks of packed tensors and there is no record, the record is
            damaged, or another version of the grid made it.
    """
    path = folder / RECORD
    packed = _quant_method(config) == QUANT_METHOD
    if not path.is_file():
        if packed:
            raise CheckpointError(
                f"{folder} is a packed Q4_0 build by its config.json and has no {RECORD}, without "
                "which its tensors cannot be checked. Copy that file, too, or build it again "
                "(recipe=q4_0_build)."
            )
        return None
    try:
        record = GridRecord(**json.loads(path.read_text(encoding="utf-8")))
        record.on_grid_share  # noqa: B018 - the figures must be figures
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as problem:
        raise CheckpointError(
            f"{path} is no record of a build ({type(problem).__name__}: {problem}). It is damaged "
            "or was edited: copy it again from where the build was made."
        ) from None
    if record.grid_version != GRID_VERSION:
        raise CheckpointError(
            f"{folder} was built with grid version {record.grid_version} and this qatlora has "
            f"{GRID_VERSION}: adapters would not fit its steps and levels. Build it again from "
            f"{record.source_name}, or use the qatlora that made it."
        )
    if packed != (record.storage == "q4_0"):
        raise CheckpointError(
            f"{path} says storage {record.storage!r} and config.json the quant_method "
            f"{_quant_method(config)!r}: they belong to different builds. Copy the "
            "folder again."
        )
    return record


def check_tensors(folder: Path, record: GridRecord, files: Mapping[str, Path]) -> None:
    """Check by the headers alone that every packed tensor, or every tensor of steps, is there.

    Raises:
        CheckpointError: one is missing, of another type, or of a width that is no whole blocks.
    """
    packed = record.storage == "q4_0"
    dtype = "U8" if packed else "F16"
    for name, num_blocks in record.blocks.items():
        key = weight_key(name) if packed else f"{name}.steps"
        if key not in files:
            raise CheckpointError(
                f"{folder} has no tensor '{key}', which its {RECORD} lists. A file is missing or "
                "belongs to another build: copy the folder again."
            )
        with safe_open(files[key], framework="pt") as opened:
            stored = opened.get_slice(key)
            shape, found = tuple(stored.get_shape()), stored.get_dtype()
        width = BLOCK_BYTES if packed else 1
        whole = len(shape) == (3 if is_stack(name) else 2) and shape[-1] % width == 0
        if found != dtype or not whole or math.prod(shape) // width != num_blocks:
            raise CheckpointError(
                f"'{key}' in {files[key]} is {found} of shape {list(shape)}, but must be {dtype} "
                f"with {width} value(s) for each of its {num_blocks} blocks. The file was edited "
                "or belongs to another build: copy the folder again."
            )
