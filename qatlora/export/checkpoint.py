"""Write the deployed model as an ordinary HF checkpoint in bf16 that lies on its Q4_0 grid.

Each tensor on the grid holds step * level rounded to bf16, as published QAT checkpoints do; all
other tensors are the source's own. `qatlora.grid.recover` finds the blocks again. They are the very
ones that were deployed where these were settled (`qatlora.grid.settle`); else the same bf16 values.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qatlora import files
from qatlora.adapters.deployed import deployed_weight
from qatlora.adapters.model import GridLayer, GridModel
from qatlora.base.names import weight_key
from qatlora.base.source import Source
from qatlora.errors import ExportError
from qatlora.export.candidate import OnTensor, stage_other_files
from qatlora.grid import decode, digest, recover
from qatlora.grid.format import BLOCK_BYTES, pack
from qatlora.report.results import CheckpointResult

IDENTITY = "qatlora.json"
_INDEX = "model.safetensors.index.json"


@dataclass
class _Written:
    """What is known of the tensors on the grid so far."""

    digests: dict[str, str]
    num_blocks: int = 0
    num_on_grid: int = 0
    num_differing: int = 0


def require_plain(source: Source) -> None:
    """Refuse a source whose tensors could not be replaced by bf16 ones of the same name.

    Raises:
        ExportError: it is an NF4 or a packed Q4_0 build.
    """
    if source.nf4_modules or source.packed_modules:
        kind = "an NF4" if source.nf4_modules else "a packed Q4_0"
        raise ExportError(
            f"{source.folder} is {kind} build, and a checkpoint on the grid is written from a bf16 "
            "one. Give base.path of the bf16 checkpoint; recipe=export_gguf writes the GGUF alone."
        )


def save_checkpoint(
    model: GridModel, folder: Path, made_by: dict[str, str], on_tensor: OnTensor
) -> CheckpointResult:
    """Write `folder` atomically: the source's files with the deployed weights in their places.

    Args:
        model: what is deployed.
        folder: where the checkpoint will lie.
        made_by: what made it, for the file `qatlora.json` beside the weights.
        on_tensor: called with 1 after each tensor on the grid.

    Raises:
        ExportError: the source is an NF4 build.
    """
    source = model.base.source
    require_plain(source)
    layers = dict(model.layers())
    written = _Written(digests={})
    with files.replacing_folder(folder) as partial:
        stage_other_files(model, partial)
        _say_bf16(partial / "config.json", source)
        if (source.folder / _INDEX).is_file():  # shards keep their names and tensors
            files.write_text(partial / _INDEX, (source.folder / _INDEX).read_text("utf-8"))
        for shard in sorted(set(source.files.values())):
            tensors = _with_deployed(source, shard, layers, written, on_tensor)
            save_file(tensors, partial / shard.name, metadata={"format": "pt"})
        files.write_json(partial / IDENTITY, made_by | {"blocks": written.digests})
        files.write_sums(partial)
    return CheckpointResult(
        path=str(folder),
        bytes=sum(path.stat().st_size for path in folder.iterdir()),
        on_grid_share=written.num_on_grid / written.num_blocks,
        differing_blocks=written.num_differing,
    )


def _with_deployed(
    source: Source,
    shard: Path,
    layers: dict[str, GridLayer],
    written: _Written,
    on_tensor: OnTensor,
) -> dict[str, Tensor]:
    """The shard's tensors, those on the grid replaced, and a count of what a reader will find."""
    tensors = {}
    with safe_open(shard, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
            called = source.model_name(key)
            name = called.removesuffix(".weight")
            if name not in layers or called != weight_key(name):
                tensors[key] = opened.get_tensor(key)
                continue
            blocks = deployed_weight(layers[name])
            tensors[key] = decode(blocks, torch.bfloat16).cpu().contiguous()
            found = recover(tensors[key])
            different = pack(found.blocks) != pack(blocks).cpu()
            written.digests[name] = digest(found.blocks)
            written.num_blocks += found.on_grid.numel()
            written.num_on_grid += int(found.on_grid.sum())
            written.num_differing += int(different.unflatten(-1, (-1, BLOCK_BYTES)).any(-1).sum())
            on_tensor(1)
    return tensors


def _say_bf16(path: Path, source: Source) -> None:
    """config.json names the type of the weights; transformers 5 writes dtype, 4 torch_dtype."""
    config = dict(source.config)
    config.pop("quantization_config", None)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    files.write_json(path, config | {key: "bfloat16"})
