"""Load a checkpoint so that every trained linear knows its steps and latent levels.

    Source (folder) -> transformers model in bf16 or NF4 -> GridLinear for each trained linear

The steps always come from the best weights at hand: recovered or searched from the bf16 source, or,
for a public NF4 build without its source, searched from the dequantized NF4 with a warning.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qatlora.base.layout import Layout
from qatlora.base.linear import GridLinear
from qatlora.base.source import Source
from qatlora.base.stores import Bf16Store, Nf4Store, Q4Store, Store, dequantized_nf4
from qatlora.config import StorageConfig
from qatlora.errors import CheckpointError
from qatlora.grid import Recovered, recover

# A checkpoint counts as on a grid when nearly all blocks of a tensor are: a single odd block (an
# edited row, say) should not send the whole tensor to the latent path.
ON_GRID_SHARE = 0.99

OnLayer = Callable[[int], None]


@dataclass(frozen=True)
class LoadedBase:
    """A base ready for adapters.

    Attributes:
        name: how people call it.
        model: transformers model whose trained linears are `GridLinear`.
        tokenizer: its tokenizer.
        source: where it came from.
        storage: nf4, q4_0 or bf16.
        grid: names of the modules that are Q4_0 in the GGUF; each is a `GridLinear`.
        trained: those of them that get an adapter, in the model's order.
        on_grid_share: share of the trained blocks that lie on a grid in the checkpoint.
        num_parameters: all parameters of the checkpoint, tied ones once.
        digest: hex SHA-256 over steps and latents of all `grid` tensors.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    storage: str
    grid: tuple[str, ...]
    trained: tuple[str, ...]
    on_grid_share: float
    num_parameters: int
    digest: str

    @property
    def on_grid(self) -> bool:
        """Whether the checkpoint as a whole lies on a grid."""
        return self.on_grid_share >= ON_GRID_SHARE


def load_base(
    source: Source,
    layout: Layout,
    storage: StorageConfig,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    on_layer: OnLayer | None = None,
) -> LoadedBase:
    """Load the model and put a `GridLinear` in place of every trained linear.

    Args:
        source: a checked folder.
        layout: which of its modules are trained, NF4 and Q4_0.
        storage: nf4, q4_0 or bf16.
        device: where the model goes.
        tokenizer: the checkpoint's, with the chat template in force.
        on_layer: called with 1 after each layer.

    Raises:
        CheckpointError: the checkpoint does not fit the settings.
    """
    kind = storage.kind.name
    if source.nf4_modules and kind != "nf4":
        raise CheckpointError(
            f"{source.folder} is stored as NF4 and storage={kind} was asked for, but NF4 has "
            f"thrown the grid away that {kind} would keep. Use storage=nf4, or give the bf16 "
            "checkpoint."
        )
    if kind == "nf4":
        model = load_nf4(source, layout, device)
    else:
        model = _from_pretrained(source.folder, device, dtype=torch.bfloat16)
    digest = hashlib.sha256()
    num_on_grid = num_blocks = 0
    for name in layout.grid:
        linear = model.get_submodule(name)
        recovered = recover(_best_weight(source, name, linear).to(device))
        share = recovered.on_grid.float().mean().item()
        store = _store(kind, linear, recovered, on_grid=share >= ON_GRID_SHARE)
        model.set_submodule(name, GridLinear(name, store, linear.bias))
        digest.update(f"{name} {store.digest()}\n".encode())
        if name in layout.trained:
            num_on_grid += int(recovered.on_grid.sum())
            num_blocks += recovered.on_grid.numel()
        if on_layer:
            on_layer(1)
    return LoadedBase(
        name=source.name,
        model=model,
        tokenizer=tokenizer,
        source=source,
        storage=kind,
        grid=layout.grid,
        trained=layout.trained,
        on_grid_share=num_on_grid / num_blocks,
        num_parameters=layout.num_parameters,
        digest=digest.hexdigest(),
    )


def load_nf4(source: Source, layout: Layout, device: torch.device) -> PreTrainedModel:
    """The frozen transformers model with exactly the modules `layout.nf4` as Linear4bit.

    Raises:
        CheckpointError: transformers cannot load it, or made other modules NF4.
    """
    quantizer = None if source.nf4_modules else _nf4_config(layout.not_nf4)
    model = _from_pretrained(
        source.folder, device, dtype=torch.bfloat16, quantization_config=quantizer
    )
    from bitsandbytes.nn import Linear4bit

    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    unquantized = [name for name in layout.nf4 if name not in linears]
    unquantized += [name for name, linear in linears.items() if linear.weight.quant_state is None]
    if set(linears) != set(layout.nf4) or unquantized:
        raise CheckpointError(
            f"After loading, {len(linears)} modules of {source.folder} are NF4 where "
            f"{len(layout.nf4)} were asked for (for example "
            f"{(unquantized or sorted(set(linears) - set(layout.nf4)))[0]}). This is a mismatch of "
            "the installed transformers and bitsandbytes: use constraints.txt."
        )
    for linear in linears.values():
        # Else a forward without gradients repacks the weight in place on some CPUs, and what
        # dequantizes it later reads garbage (bitsandbytes 0.50).
        linear.support_avx512bf16_for_cpu = False
    _forget_quantizer(model)
    return model


def load_plain(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen transformers model without any grid: the teacher, or a model to compare with.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    return _from_pretrained(folder, device, dtype=dtype)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's fast tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as problem:  # transformers raises many classes for one cause
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load ({type(problem).__name__}: "
            f"{str(problem).splitlines()[0]}). Copy tokenizer.json and tokenizer_config.json of "
            "the original model into it."
        ) from problem


def _nf4_config(skipped: tuple[str, ...]) -> BitsAndBytesConfig:
    """NF4, double quant, bf16 compute, uint8 storage, and every other linear named as skipped.

    The skip list holds full names, because transformers matches keys from the start of a name or
    as a bare suffix: 'proj' would skip every q_proj.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=list(skipped),
    )


def _from_pretrained(folder: Path, device: torch.device, **options: object) -> PreTrainedModel:
    options = {key: value for key, value in options.items() if value is not None}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=str(device), **options)
    except Exception as problem:  # transformers raises many classes for one cause
        raise CheckpointError(
            f"transformers could not load {folder} ({type(problem).__name__}: "
            f"{str(problem).splitlines()[0]}). Check that the folder is whole and that its "
            "architecture is supported by the installed transformers."
        ) from problem
    return model.eval().requires_grad_(False)


def _best_weight(source: Source, name: str, linear: nn.Module) -> torch.Tensor:
    """The bf16 source weight, or the dequantized NF4 where there is no source."""
    if name not in source.nf4_modules:
        return source.tensor(f"{name}.weight")
    warnings.warn(
        f"{source.name} is an NF4 build whose bf16 source is not at hand, so its steps are "
        "searched from the NF4 values: only about a quarter of an on-grid checkpoint's weights "
        "come back. Give base.path of the bf16 checkpoint to keep its grid.",
        stacklevel=2,
    )
    return dequantized_nf4(linear.weight)


def _store(kind: str, linear: nn.Module, recovered: Recovered, *, on_grid: bool) -> Store:
    if kind == "q4_0":
        return Q4Store(recovered.blocks)
    # A module that is Q4_0 in the GGUF but not in the NF4 list stays bf16 in memory.
    if hasattr(linear.weight, "quant_state"):
        return Nf4Store(linear.weight, recovered.blocks.steps, on_grid=on_grid)
    return Bf16Store(linear.weight.detach(), recovered.blocks.steps, on_grid=on_grid)


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Drop the marks of bitsandbytes, on which Trainer and TRL act (adapters cast to bf16)."""
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    for attribute in ("is_quantized", "is_loaded_in_4bit"):
        setattr(model, attribute, False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
