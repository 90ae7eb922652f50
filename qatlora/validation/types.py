"""What each GGUF type does to the trained tensors of a checkpoint.

On a Q4_0 grid Q4_0 itself can be exact; every other type rounds, finer ones less. Q8_0 is computed
by gguf-py; K-quants only llama-quantize can write, from a GGUF of the whole checkpoint.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from qatlora.base.from_gguf import model_from_gguf
from qatlora.base.layout import Layout, plain_config
from qatlora.base.names import text_model_name, weight_key
from qatlora.base.others import deployed_other
from qatlora.base.source import Source
from qatlora.export.plain_gguf import write_plain_gguf
from qatlora.grid import BLOCK_SIZE
from qatlora.llamacpp.tools import convert_types, find_tool
from qatlora.report.results_inspect import InspectResult
from qatlora.report.results_validate import BY_GRID, BY_LLAMA_CPP, TypeDamage

_BY_LLAMA_QUANTIZE = ("Q4_K_M", "Q6_K")

Decoded = Callable[[str, Tensor], Tensor]


def damage_by_type(source: Source, layout: Layout, inspection: InspectResult) -> list[TypeDamage]:
    """Every type, K-quants where llama-quantize is at hand.

    Args:
        source: the checkpoint.
        layout: its trained tensors.
        inspection: of the same tensors; it knows Q4_0 already.

    Raises:
        ExportError, ToolError: llama.cpp failed on the checkpoint.
    """
    shares = inspection.reference_exact_share, inspection.on_grid_share
    errors = inspection.error_reference, inspection.error_ours
    found = [
        TypeDamage(name, error, share)
        for name, error, share in zip((BY_LLAMA_CPP, BY_GRID), errors, shares, strict=True)
    ]
    found.append(damage("Q8_0", source, layout.trained, lambda _, w: deployed_other(w, "q8_0")))
    if find_tool("llama-quantize") is not None:
        found += _by_llama_quantize(source, layout)
    return found


def damage(name: str, source: Source, modules: Iterable[str], decoded: Decoded) -> TypeDamage:
    """Compare the named weights with what a type makes of them.

    Args:
        name: of the type.
        source: the checkpoint.
        modules: names in the lists.
        decoded: module and stored weight to float weight.
    """
    errors = weights = 0.0
    exact = total = 0
    for module in modules:
        stored = source.tensor(weight_key(module))
        other = decoded(module, stored).float()
        errors += torch.linalg.vector_norm(other - stored.float()).item() ** 2
        weights += torch.linalg.vector_norm(stored.float()).item() ** 2
        same = (other.to(stored.dtype) == stored).unflatten(-1, (-1, BLOCK_SIZE)).all(-1)
        exact, total = exact + int(same.sum()), total + same.numel()
    return TypeDamage(name, (errors / weights) ** 0.5 if weights else 0.0, exact / total)


def _by_llama_quantize(source: Source, layout: Layout) -> list[TypeDamage]:
    found = []
    with tempfile.TemporaryDirectory(prefix="qatlora-types-") as folder:
        scratch = Path(folder)
        whole = scratch / "whole.gguf"
        write_plain_gguf(source, layout.tied, whole)
        for name in _BY_LLAMA_QUANTIZE:
            quantized = scratch / f"{name}.gguf"
            convert_types(whole, quantized, name)
            model = model_from_gguf(quantized, plain_config(source.folder), torch.float32)
            weights = dict(model.named_parameters())
            quantized.unlink()
            found.append(
                damage(
                    name,
                    source,
                    layout.trained,
                    lambda m, _, w=weights: w[text_model_name(weight_key(m))],
                )
            )
    return found
