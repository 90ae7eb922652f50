"""From a method of the table to a model that the training room can train."""

from dataclasses import dataclass

import torch

from qatlora.adapters.attach import AdaptedModel, attach
from qatlora.base.layout import Layout
from qatlora.base.load import load_base, load_nf4, load_plain, load_tokenizer
from qatlora.base.others import deploy_others, others_to
from qatlora.base.source import Source
from qatlora.benchmark.methods import Method
from qatlora.benchmark.plain_peft import PlainPeft, attach_plain
from qatlora.config import AdapterConfig, Storage, StorageConfig


@dataclass(frozen=True)
class Ground:
    """What all methods of a run stand on.

    Attributes:
        source: the checkpoint.
        layout: its trained modules.
        adapter: rank and alpha; kind, rounding and dither are the method's own.
        other_type: GGUF type of the embeddings, already in training (see `base.others`).
        device: where to compute.
        compute_dtype: of the matrix products.
    """

    source: Source
    layout: Layout
    adapter: AdapterConfig
    other_type: str
    device: torch.device
    compute_dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """The arithmetic of a forward in training."""
        enabled = self.compute_dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


def build(method: Method, ground: Ground, seed: int) -> AdaptedModel | PlainPeft:
    """Load the base in the method's storage and put its adapter on; nothing is changed yet."""
    source, layout, device = ground.source, ground.layout, ground.device
    tokenizer = load_tokenizer(source.folder)
    if method.kind is not None:
        storage = StorageConfig(kind=Storage[method.storage])
        base = load_base(source, layout, storage, device, tokenizer)
        others_to(base.model, ground.compute_dtype)
        deploy_others(base.model, layout.grid, ground.other_type)
        return attach(base, method.rule(ground.adapter, seed))
    if method.storage == "nf4":
        model = load_nf4(source, layout, device)
    else:
        model = load_plain(source.folder, device, torch.bfloat16)
    others_to(model, ground.compute_dtype)
    deploy_others(model, layout.grid, ground.other_type)
    return attach_plain(model, tokenizer, layout.trained, ground.adapter, seed)
