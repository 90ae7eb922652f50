"""Gate 1: the blocks in the file are the blocks that were trained, bit for bit."""

from collections.abc import Iterable

import torch
from torch import Tensor

from qatlora.base.names import weight_key
from qatlora.config import GuardConfig
from qatlora.errors import ExportError
from qatlora.export.candidate import Candidate
from qatlora.grid import Q4Blocks, digest, pack
from qatlora.grid.format import BLOCK_BYTES
from qatlora.llamacpp.convert import TensorPlace
from qatlora.llamacpp.gguf_read import GgufFile, read_gguf
from qatlora.report.results import GateResult


def identity_gate(
    candidate: Candidate,
    deployed: Iterable[tuple[str, Q4Blocks]],
    recorded: dict[str, str],
    settings: GuardConfig,
) -> GateResult:
    """Count blocks of the file that differ from the trained model's.

    Args:
        candidate: the file.
        deployed: (module name, deployed blocks) of every Q4_0 tensor of the model at hand.
        recorded: module name -> SHA-256 of its packed blocks when training ended.
        settings: the limit.

    A tensor whose blocks at hand are no longer the recorded ones counts with all its blocks: then
    the file may equal the model at hand, but that is not the model that was trained.
    """
    opened = read_gguf(candidate.path)
    num_blocks = num_differing = num_tensors = 0
    first_difference = ""
    for name, blocks in deployed:
        expected = pack(blocks).cpu()
        stored = stored_rows(opened, candidate.places[weight_key(name)], expected.shape)
        differing = (expected != stored).unflatten(-1, (-1, BLOCK_BYTES)).any(-1)
        count = int(differing.sum())
        if recorded.get(name) != digest(blocks):
            count = differing.numel()
        if count and not first_difference:
            first_difference = f"; the first is in {name}"
        num_tensors += 1
        num_blocks += differing.numel()
        num_differing += count
    limit = settings.identity_max_differing_blocks
    return GateResult(
        name="identity",
        value=float(num_differing),
        limit=float(limit),
        unit="differing blocks",
        status="passed" if num_differing <= limit else "failed",
        message=f"{num_differing} of {num_blocks} blocks in {num_tensors} tensors differ from "
        f"those recorded when training ended{first_difference}",
    )


def stored_rows(opened: GgufFile, place: TensorPlace, shape: torch.Size) -> Tensor:
    """The packed rows of one tensor of the file in the checkpoint's row order, uint8 `shape`.

    Raises:
        ExportError: the file lacks the tensor or stores it as another type or shape.
    """
    tensor = opened.tensors.get(place.gguf_name)
    if tensor is None or tensor.type_name != "Q4_0" or tensor.data.size != shape.numel():
        found = "absent" if tensor is None else f"{tensor.type_name} of shape {tensor.shape}"
        raise ExportError(
            f"{place.gguf_name} of {opened.path} is {found} where Q4_0 with {shape.numel()} bytes "
            "was handed over. The converter changed it: use the pinned llama.cpp source."
        )
    rows = torch.from_numpy(tensor.data.copy()).reshape(shape)
    if place.row_order is None:
        return rows
    restored = torch.empty_like(rows).flatten(0, -2)
    restored[torch.as_tensor(place.row_order)] = rows.flatten(0, -2)
    return restored.reshape(shape)
