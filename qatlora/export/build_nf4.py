"""Build the public NF4 layout from a bf16 checkpoint, with the source's steps beside it.

The layout is bitsandbytes' own (NF4, double quant, bf16 compute, uint8 storage), with every linear
that stays in bf16 named in the skip list: plain transformers loads the folder. What it does not
read is q4_0_steps.safetensors: half a bit per weight that NF4 alone cannot give back. The layout
has no place for stacks of experts, which stay bf16 in the folder and become NF4 while it is loaded.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from qatlora.base.grids import layer_grid
from qatlora.base.layout import Layout, plain_config
from qatlora.base.load import require_nf4
from qatlora.base.nf4 import dequantized_nf4, nf4_config, tensors_of_nf4
from qatlora.base.record import STEPS_FILE, GridRecord
from qatlora.base.source import Source
from qatlora.base.stores import Nf4Store
from qatlora.config import BuildConfig
from qatlora.errors import ExportError
from qatlora.export.census import Census
from qatlora.export.shards import ShardWriter, kept_in_bf16

OnTensor = Callable[[int], None]


def build_nf4(
    source: Source,
    layout: Layout,
    folder: Path,
    max_shard_bytes: float,
    device: torch.device,
    on_tensor: OnTensor,
) -> GridRecord:
    """Write weights, config.json, the steps and grid.json into `folder`.

    Memory: on the host one shard, one tensor and the steps of all layers; on `device` one tensor
    and what becomes of it.

    Args:
        source: a bf16, fp16 or fp32 checkpoint.
        layout: its Q4_0 and NF4 lists.
        folder: an empty folder.
        max_shard_bytes: size of a safetensors file at most, unless one tensor is larger.
        device: where NF4 and the steps are computed.
        on_tensor: called with 1 after each tensor of the source.
    """
    census, steps, shards = Census(), {}, ShardWriter(folder, max_shard_bytes)
    for key in source.files:
        tensor = source.tensor(key)
        census.read(key, tensor)
        name, parts, stored = key.removesuffix(".weight"), kept_in_bf16(layout, key, tensor), tensor
        if name in layout.grid:
            grid = layer_grid(source, name, layout.kept_as(name, "nf4"), device)
            steps[f"{name}.steps"] = grid.steps.cpu()
            if name in layout.nf4_modules:
                (store,) = grid.stores
                assert isinstance(store, Nf4Store)
                parts, stored = tensors_of_nf4(key, store.weight), dequantized_nf4(store.weight)
            census.built(name, grid, tensor.to(device), stored.to(device))
        shards.add_all(parts)
        on_tensor(1)
    shards.close()
    save_file(steps, folder / STEPS_FILE)
    record = census.record(source, layout, "nf4")
    record.write(folder)
    config = plain_config(source.folder)
    config.dtype, config.quantization_config = torch.bfloat16, nf4_config(layout.not_nf4)
    config.save_pretrained(folder)
    return record


@torch.no_grad()
def check_nf4(
    folder: Path,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    settings: BuildConfig,
    device: torch.device,
) -> str:
    """Load the folder as anybody would and let it write; returns what it wrote, greedily.

    Raises:
        CheckpointError: other modules are NF4 than the list says.
        ExportError: its logits are not finite.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=str(device)).eval()
    require_nf4(model, layout.nf4_modules, folder)
    inputs = tokenizer(settings.prompt, return_tensors="pt").to(device)
    logits: Tensor = model(**inputs).logits
    if not bool(logits.isfinite().all()):
        raise ExportError(
            f"The NF4 build in {folder} gives logits that are not finite, so it is not kept: the "
            "bf16 checkpoint is damaged, or overflows in bf16. Try that checkpoint itself."
        )
    produced = model.generate(
        **inputs,
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        top_k=None,
        top_p=None,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    new = produced[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))
