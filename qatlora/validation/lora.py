"""A plain LoRA folder of PEFT, Unsloth or Axolotl, merged as people merge it: to bf16."""

import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel

from qatlora.base.load import load_plain
from qatlora.base.source import Source
from qatlora.errors import AdapterError, first_line
from qatlora.export.folders import copy_side_files

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def require_lora(folder: Path) -> None:
    """Check that PEFT can merge it, before a weight is read.

    Raises:
        AdapterError: the folder is no LoRA, or one of ours.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise AdapterError(
            f"validate.adapter is '{folder}', whose {_CONFIG} cannot be used "
            f"({type(problem).__name__}). Give the folder that PEFT's save_pretrained wrote."
        ) from None
    if kind == "QATLORA":
        raise AdapterError(
            f"{folder} is an adapter of qatlora, which the guard of its own run has judged. Use "
            f"recipe=merge adapter.path={folder} on its base."
        )
    if kind != "LORA":
        raise AdapterError(
            f"{folder} is of peft_type {kind}, and only LORA can be merged here. Merge it with the "
            "tool that made it and give validate.merged=FOLDER."
        )
    if config.get("megatron_config"):
        raise AdapterError(
            f"{folder} has a megatron_config, for which PEFT imports the module that the file "
            "names as megatron_core. Merge it with the tool that made it and give "
            "validate.merged=FOLDER."
        )
    if not (folder / _WEIGHTS).is_file():
        raise AdapterError(
            f"{folder} has no {_WEIGHTS}. Only safetensors are read (a pickle can run code): save "
            "the adapter with a current PEFT."
        )


def merge_lora(source: Source, adapter: Path, target: Path) -> None:
    """Write the merged checkpoint: PEFT's own merge in float32, rounded to bf16.

    Args:
        source: the bf16 base.
        adapter: a folder that `require_lora` accepts.
        target: an existing empty folder.

    Raises:
        AdapterError: it does not fit the base.
    """
    model = load_plain(source.folder, torch.device("cpu"), torch.float32)
    try:
        with warnings.catch_warnings():
            # PEFT goes on with factors of its own where the adapter's names are others.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except Exception as problem:  # peft raises many classes for one cause
        raise AdapterError(
            f"PEFT cannot put {adapter} on {source.folder} ({type(problem).__name__}: "
            f"{first_line(problem)}). Give base.path of the checkpoint that it was "
            "trained on."
        ) from problem
    merged.to(torch.bfloat16).save_pretrained(target)
    copy_side_files(source.folder, target)
