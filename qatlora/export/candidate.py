"""Write the GGUF beside its place: a candidate that only a passed guard can publish.

A staging folder is an ordinary HF folder whose Q4_0 tensors are taken out and handed over as packed
blocks; llama.cpp's own converter maps names, tokenizer and metadata and copies the blocks verbatim.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from qatlora import files
from qatlora.adapters.model import GridModel
from qatlora.base.names import weight_key
from qatlora.config import ExportConfig
from qatlora.data.templates import exported_template, own_template
from qatlora.errors import ExportError
from qatlora.export.folders import copy_side_files
from qatlora.grid import pack
from qatlora.llamacpp.convert import TensorPlace, convert

OnTensor = Callable[[int], None]


@dataclass(frozen=True)
class Candidate:
    """An unpublished GGUF.

    Attributes:
        path: the file, in a hidden folder of the run folder.
        final_path: where `publish` would put it.
        places: HF tensor name (`weight_key`) -> its name and row order in the file.
    """

    path: Path
    final_path: Path
    places: dict[str, TensorPlace]

    def discard(self) -> None:
        """Remove the hidden folder and everything in it."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


@dataclass(frozen=True)
class GuardPassed:
    """Proof that `guard` let a candidate through; only the guard makes one.

    Attributes:
        candidate_sha256: of the very file that was judged.
        override: the reason given to publish in spite of a failed gate, else None.
    """

    candidate_sha256: str
    override: str | None


def final_path(settings: ExportConfig, base_name: str, run_dir: Path) -> Path:
    """Where the GGUF will lie: `export.file_name` or BASE-Q4_0.gguf in the run folder."""
    return run_dir / (settings.file_name or f"{base_name}-qatlora-Q4_0.gguf")


def write_candidate(
    adapted: GridModel,
    settings: ExportConfig,
    run_dir: Path,
    stamp: dict[str, str],
    on_tensor: OnTensor,
) -> Candidate:
    """Convert the deployed model to a GGUF in `run_dir`/.candidate.

    Args:
        adapted: the trained model.
        settings: type of the other tensors, file name.
        run_dir: the run's folder.
        stamp: metadata that says what made the file; keys get the prefix ``qatlora.``.
        on_tensor: called with 1 after each packed tensor.

    Raises:
        ExportError: the converter failed.
    """
    target = final_path(settings, adapted.base.name, run_dir)
    hidden = run_dir / ".candidate"
    shutil.rmtree(hidden, ignore_errors=True)
    staging = hidden / "staging"
    staging.mkdir(parents=True)
    stage_other_files(adapted, staging)
    _stage_other_tensors(adapted, staging)
    packed = {}
    for name, blocks in adapted.deployed():
        packed[weight_key(name)] = pack(blocks).cpu()
        on_tensor(1)
    save_file(packed, staging / "deployed.safetensors")
    path = hidden / target.name
    metadata = {f"qatlora.{key}": value for key, value in stamp.items()}
    result = convert(staging, path, settings.other_type.name, metadata)
    shutil.rmtree(staging)
    lacking = sorted(set(packed) - set(result.tensor_map))
    if lacking:
        raise ExportError(
            f"The converter wrote {len(result.tensor_map)} of {len(packed)} Q4_0 tensors; "
            f"{lacking[0]} is missing. The installed llama.cpp source does not know this layout."
        )
    return Candidate(path, target, result.tensor_map)


def stage_other_files(adapted: GridModel, staging: Path) -> None:
    """Copy what is no weight: configuration, tokenizer, template without marks for training."""
    source = adapted.base.source
    copy_side_files(source.folder, staging)
    config: dict[str, Any] = dict(source.config)
    config.pop("quantization_config", None)
    files.write_json(staging / "config.json", config)
    tokenizer = adapted.base.tokenizer
    if tokenizer.chat_template:
        template = exported_template(
            tokenizer, tokenizer.chat_template, own_template(source.folder)
        )
        files.write_text(staging / "chat_template.jinja", template)


def _stage_other_tensors(adapted: GridModel, staging: Path) -> None:
    """Copy every tensor that is not deployed as Q4_0, one file at a time."""
    source, model = adapted.base.source, adapted.base.model
    deployed = set(map(weight_key, adapted.base.grid))
    # A stray lm_head.weight in a tied checkpoint would untie the exported model, and a tensor that
    # the model has no place for (Gemma 4's checkpoints may have k_proj in layers that share their
    # keys) would be written into the file.
    wanted = model.state_dict().keys() - ({"lm_head.weight"} if adapted.base.tied else set())
    shards = sorted(set(source.files.values()))
    for number, shard in enumerate(shards, start=1):
        kept = {}
        with safe_open(shard, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                name = source.model_name(key)
                if name in wanted and name not in deployed:
                    kept[key] = opened.get_tensor(key)
        if kept:
            save_file(kept, staging / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
