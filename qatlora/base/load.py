"""Load a checkpoint so that every trained weight knows its steps and latent levels.

    Source (folder) -> transformers model without the weights on the grid
                    -> one weight after the other: GridLinear for each linear of the Q4_0 list,
                                                   ExpertStack for each stack of experts

Where the steps come from is told in `qatlora.base.grids`. Only storage=bf16 makes a dense model.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qatlora.base.digests import digest_of_others
from qatlora.base.experts import PLAIN_IMPLEMENTATION, put_layer
from qatlora.base.grids import ON_GRID_SHARE, base_digest, layer_grid
from qatlora.base.intact import require_all_found, require_sum
from qatlora.base.layout import Layout
from qatlora.base.nf4 import make_safe, nf4_config
from qatlora.base.packed import model_unpacked
from qatlora.base.record import is_packed
from qatlora.base.source import Source, read_source
from qatlora.base.streamed import model_without
from qatlora.config import StorageConfig
from qatlora.errors import CheckpointError, first_line

OnLayer = Callable[[int], None]


@dataclass(frozen=True)
class LoadedBase:
    """A base ready for adapters.

    Attributes:
        name: how people call it.
        model: transformers model whose weights on the grid are `GridLinear` or `ExpertStack`.
        tokenizer: its tokenizer.
        source: where it came from.
        storage: nf4, q4_0 or bf16.
        grid: names of the weights that are Q4_0 in the GGUF; each names such a layer.
        trained: those of them that get an adapter, in the model's order.
        on_grid_share: share of the trained blocks that lie on a grid in the checkpoint.
        num_parameters: all parameters of the checkpoint, tied ones once.
        digest: hex SHA-256 over steps and latents of all `grid` tensors.
        others_digest: the same of all other tensors, as loaded.
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
    others_digest: str

    @property
    def on_grid(self) -> bool:
        """Whether the checkpoint as a whole lies on a grid."""
        return self.on_grid_share >= ON_GRID_SHARE

    @property
    def tied(self) -> bool:
        """Whether the embeddings are the head, which config.json may be silent about (Gemma's)."""
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return embeddings.weight is head.weight


def load_base(
    source: Source,
    layout: Layout,
    storage: StorageConfig,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    on_layer: OnLayer | None = None,
) -> LoadedBase:
    """Load the model and put a layer on the grid in the place of every Q4_0 weight.

    Args:
        source: a checked folder.
        layout: which of its weights are trained, NF4 and Q4_0.
        storage: nf4, q4_0 or bf16.
        device: where the model goes.
        tokenizer: the checkpoint's, with the chat template in force.
        on_layer: called with 1 after each layer.

    Raises:
        CheckpointError: the checkpoint does not fit the settings.
    """
    kind = storage.kind.name
    require_storage(source, kind)
    model = model_without(source, layout.grid, device, torch.bfloat16)
    digests, num_on_grid, num_blocks = {}, 0, 0
    for name in layout.grid:
        grid = layer_grid(source, name, layout.kept_as(name, kind), device)
        put_layer(model, name, grid.stores)
        digests[name] = grid.digest()
        if name in layout.trained:
            num_on_grid += grid.num_on_grid
            num_blocks += grid.num_blocks
        if on_layer:
            on_layer(1)
    digest = base_digest(digests)
    _require_recorded(source, kind, digests.keys(), digest)
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
        digest=digest,
        others_digest=digest_of_others(model, layout.grid),
    )


def load_plain(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen transformers model without any grid: the teacher, or a model to compare with.

    Of a packed Q4_0 build every linear is decoded to `dtype`; float32 holds it exactly.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    if is_packed(folder):
        return model_unpacked(read_source(folder, folder.name), device, dtype)
    return _from_pretrained(folder, device, dtype=dtype)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's fast tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as problem:  # transformers raises many classes for one cause
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load ({type(problem).__name__}: "
            f"{first_line(problem)}). Copy tokenizer.json and tokenizer_config.json of "
            "the original model into it."
        ) from problem


def require_storage(source: Source, kind: str) -> None:
    """Check that a build can be kept in memory as `kind` (nf4, q4_0 or bf16).

    Raises:
        CheckpointError: it would lose what it has, or cannot have what it lost.
    """
    if source.nf4_modules and kind != "nf4":
        raise CheckpointError(
            f"{source.folder} is stored as NF4 and storage={kind} was asked for, but NF4 has "
            f"thrown the grid away that {kind} would keep. Use storage=nf4, or give the bf16 "
            "checkpoint."
        )
    if source.packed_modules and kind == "nf4":
        raise CheckpointError(
            f"{source.folder} is stored as packed Q4_0 and storage=nf4 was asked for, which would "
            "throw away levels that lie here exactly, to save a tenth of the memory. Use "
            "storage=q4_0, or storage=bf16, which is exact, too."
        )


def _require_recorded(source: Source, kind: str, grid: Collection[str], digest: str) -> None:
    """A build loaded as it was stored must have the steps and levels that its record tells of."""
    record = source.record
    if record is None or record.storage != kind or set(grid) != record.blocks.keys():
        return
    if digest != record.base_digest:
        raise CheckpointError(
            f"The steps and levels in {source.folder} have the digest {digest} and its record says "
            f"{record.base_digest}: a tensor was damaged or edited after the build. Copy the "
            "folder again, or build it again."
        )


def load_nf4(source: Source, layout: Layout, device: torch.device) -> PreTrainedModel:
    """The frozen transformers model with exactly `layout.nf4_modules` as Linear4bit.

    Raises:
        CheckpointError: transformers cannot load it, or made other modules NF4.
    """
    quantizer = None if source.nf4_modules else nf4_config(layout.not_nf4)
    model = _from_pretrained(
        source.folder, device, dtype=torch.bfloat16, quantization_config=quantizer
    )
    require_nf4(model, layout.nf4_modules, source.folder)
    _forget_quantizer(model)
    return model


def require_nf4(model: PreTrainedModel, wanted: Collection[str], folder: Path) -> None:
    """Check that exactly the modules `wanted` are NF4, and make their forward safe on a CPU.

    Raises:
        CheckpointError: another module is, or one of them is not.
    """
    from bitsandbytes.nn import Linear4bit

    found = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    wrong = [name for name in wanted if name not in found]
    wrong += [name for name, linear in found.items() if linear.weight.quant_state is None]
    wrong += sorted(found.keys() - set(wanted))
    if wrong:
        raise CheckpointError(
            f"After loading, {len(found)} modules of {folder} are NF4 where {len(wanted)} were "
            f"asked for (for example {wrong[0]}). This is a mismatch of the installed "
            "transformers and bitsandbytes: use constraints.txt."
        )
    for linear in found.values():
        make_safe(linear)


def _from_pretrained(folder: Path, device: torch.device, **options: object) -> PreTrainedModel:
    for path in folder.glob("*.safetensors"):
        require_sum(path)
    options = {key: value for key, value in options.items() if value is not None}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map=str(device),
            experts_implementation=PLAIN_IMPLEMENTATION,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as problem:  # transformers raises many classes for one cause
        raise CheckpointError(
            f"transformers could not load {folder} ({type(problem).__name__}: "
            f"{first_line(problem)}). Check that the folder is whole and that its "
            "architecture is supported by the installed transformers."
        ) from problem
    require_all_found(folder, found["missing_keys"])
    return model.eval().requires_grad_(False)


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Drop the marks of bitsandbytes, on which Trainer and TRL act (adapters cast to bf16)."""
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    for attribute in ("is_quantized", "is_loaded_in_4bit"):
        setattr(model, attribute, False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
