"""A small file that makes the merged GGUF of a `steps` adapter out of the base's GGUF.

Such an adapter changes steps alone, by a low-rank factor, so the two files differ in two bytes of
each block and in their metadata. The patch holds the factors as the export used them, in the row
order of the GGUF, and the part of the header that differs:

    NAME.up     float32 [out, r]           of experts [E, out, r]
    NAME.down   float32 [r, in / 32]       and [E, r, in / 32]; step' = fp16(step * (1 + up @ down))
    header      uint8, bytes in place of the base's from `header_start` to `header_stop`

Metadata: the format's and the grid's version, name and SHA-256 of both files, and what lay beside
the exported one. A base of another digest is refused, and so is a result: nothing but the exported
file, byte for byte, gets its name.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qatlora import files
from qatlora.adapters.attach import AdaptedModel
from qatlora.adapters.deployed import changed_steps, low_rank
from qatlora.adapters.layer import AdapterLayer
from qatlora.base.names import is_stack, weight_key
from qatlora.errors import ExportError
from qatlora.export.patch_head import FORMAT, Beside, PatchHead, no_patch, opened, read_head
from qatlora.grid import BLOCK_BYTES, GRID_VERSION
from qatlora.grid.format import STEP_BYTES
from qatlora.llamacpp.convert import TensorPlace
from qatlora.llamacpp.gguf_read import GgufFile, GgufTensor, read_gguf

_COUNTS_BYTES = 24  # magic, version, number of tensors, number of metadata entries
_HEADER = "header"


@dataclass(frozen=True)
class StepFactors:
    """Low-rank change of one tensor's steps: up [..., out, r], down [..., r, in / 32], float32."""

    up: Tensor
    down: Tensor

    def change(self) -> Tensor:
        """Their product [..., out, in / 32], of experts one by one, as in training."""
        if self.up.ndim == 2:
            return low_rank(self.up, self.down, 1.0)
        pairs = zip(self.up, self.down, strict=True)
        return torch.stack([low_rank(up, down, 1.0) for up, down in pairs])


def step_factors(
    adapted: AdaptedModel, places: dict[str, TensorPlace]
) -> Iterator[tuple[str, StepFactors]]:
    """Yield (GGUF tensor name, factors) of every tensor whose steps the adapter changes.

    Args:
        adapted: a model with adapters of kind steps.
        places: HF tensor name (`weight_key`) -> its place in the GGUF.
    """
    for name, layer in adapted.layers():
        if not isinstance(layer, AdapterLayer):
            continue
        up, down = layer.parameters_of("lora_steps_B"), layer.parameters_of("lora_steps_A")
        assert up is not None
        assert down is not None
        place = places[weight_key(name)]
        up, down = up.detach().cpu(), down.detach().cpu()
        if place.row_order is not None:
            up = up[torch.as_tensor(place.row_order)]
        if is_stack(name):
            num = layer.get_base_layer().num_matrices
            up, down = up.unflatten(0, (num, -1)), down.unflatten(0, (num, -1))
        yield place.gguf_name, StepFactors(up.contiguous(), down.contiguous())


def write_patch(
    base: Path, result: Path, factors: dict[str, StepFactors], beside: Beside, target: Path
) -> None:
    """Write the patch that makes `result` of `base`, and apply it once to be sure.

    Raises:
        ExportError: the two files differ in more than these factors explain.
    """
    start, stop, replaced = _difference(read_gguf(base), read_gguf(result))
    head = PatchHead(
        format=FORMAT,
        grid_version=str(GRID_VERSION),
        base_sha256=files.sha256_of_file(base),
        base_name=base.name,
        result_sha256=files.sha256_of_file(result),
        result_name=result.name,
        header_start=str(start),
        header_stop=str(stop),
        card=beside.card,
        stops=json.dumps(beside.stops),
    )
    tensors = {_HEADER: torch.frombuffer(bytearray(replaced), dtype=torch.uint8)}
    for name, pair in factors.items():
        tensors |= {f"{name}.up": pair.up, f"{name}.down": pair.down}
    with files.replacing(target) as partial:
        save_file(tensors, partial, metadata=dataclasses.asdict(head))
        trial = target.with_name(f".{target.name}.trial.partial")
        try:
            apply_patch(base, partial, trial)
        finally:
            trial.unlink(missing_ok=True)


def apply_patch(base: Path, patch: Path, target: Path) -> PatchHead:
    """Write `target`, the exported file; memory: one tensor.

    Raises:
        CheckpointError: the base is no whole GGUF.
        ExportError: the base or the patch is another or damaged, or this machine computes other
            steps; nothing is written then.
    """
    head = read_head(patch)
    digest = files.sha256_of_file(base)
    if digest != head.base_sha256:
        raise ExportError(
            f"{base} has SHA-256 {digest}, and {patch.name} belongs to {head.base_name} with "
            f"{head.base_sha256}. Give that file as patch.base: an export with export.patch=true "
            "writes it beside the patch."
        )
    with files.replacing(target) as partial:
        try:
            with opened(patch) as tensors:
                _write_with_header(read_gguf(base), head, tensors.get_tensor(_HEADER), partial)
                _change_steps(read_gguf(partial), tensors, patch)
        except (SafetensorError, ValueError) as problem:
            raise no_patch(patch, str(problem)) from None
        digest = files.sha256_of_file(partial)
        if digest != head.result_sha256:
            raise ExportError(
                f"{patch} applied to {base} gives SHA-256 {digest} where {head.result_sha256} was "
                "exported: the patch is damaged, or sums are rounded otherwise on this machine. "
                "Fetch the patch again, or the whole file."
            )
    return head


def _difference(base: GgufFile, result: GgufFile) -> tuple[int, int, bytes]:
    """The bytes of the base's header that differ, and what stands in their place.

    The counts at the very beginning are left out and come first in the replacement: a further
    entry changes them and what follows much later.
    """
    before, after = _header(base), _header(result)
    own, other = (np.frombuffer(one, np.uint8)[_COUNTS_BYTES:] for one in (before, after))
    shorter = min(len(own), len(other))
    start = _num_equal(own[:shorter], other[:shorter])
    rest = shorter - start
    end = _num_equal(own[::-1][:rest], other[::-1][:rest])
    replaced = after[:_COUNTS_BYTES] + other[start : len(other) - end].tobytes()
    return start + _COUNTS_BYTES, len(before) - end, replaced


def _num_equal(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    """How many bytes are equal before the first that differs."""
    differing = one != other
    return int(differing.argmax()) if differing.any() else len(differing)


def _header(gguf: GgufFile) -> bytes:
    with gguf.path.open("rb") as handle:
        return handle.read(gguf.header_bytes)


def _write_with_header(base: GgufFile, head: PatchHead, replaced: Tensor, target: Path) -> None:
    """The base's file with the replaced header before its data."""
    before, new = _header(base), replaced.numpy().tobytes()
    start, stop = int(head.header_start), int(head.header_stop)
    header = new[:_COUNTS_BYTES] + before[_COUNTS_BYTES:start] + new[_COUNTS_BYTES:] + before[stop:]
    with base.path.open("rb") as source, target.open("wb") as written:
        written.write(header)
        written.write(bytes(-len(header) % base.alignment))
        source.seek(base.data_start)
        shutil.copyfileobj(source, written, 1 << 20)


def _change_steps(gguf: GgufFile, tensors: Any, patch: Path) -> None:
    """Replace the steps of the file's tensors in place."""
    content = np.memmap(gguf.path, dtype=np.uint8, mode="r+")
    for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
        if not key.endswith(".up"):
            continue
        name = key.removesuffix(".up")
        pair = StepFactors(tensors.get_tensor(key), tensors.get_tensor(f"{name}.down"))
        tensor = gguf.tensors.get(name)
        if tensor is None or not _fits(tensor, pair):
            raise no_patch(patch, f"its factors do not fit the tensor {name}")
        stop = tensor.start + tensor.data.size
        blocks = content[tensor.start : stop].reshape(*pair.up.shape[:-1], -1, BLOCK_BYTES)
        stored = blocks[..., :STEP_BYTES].copy().view(np.float16).squeeze(-1)
        steps = changed_steps(torch.from_numpy(stored), pair.change())
        blocks[..., :STEP_BYTES] = steps.unsqueeze(-1).numpy().view(np.uint8)
    content.flush()


def _fits(tensor: GgufTensor, pair: StepFactors) -> bool:
    if pair.up.ndim != pair.down.ndim or pair.up.ndim not in (2, 3):
        return False
    *experts, rank, columns = pair.down.shape
    shape = (*pair.up.shape[:-1], columns * BLOCK_BYTES)
    fits_file = tensor.type_name == "Q4_0" and tensor.data.shape == shape
    return fits_file and (*pair.up.shape[:-2], pair.up.shape[-1]) == (*experts, rank)
