"""A store of each kind from a weight, for several test folders."""

import torch
from torch import Tensor

from qatlora.base.stores import Bf16Store, Nf4Store, Q4Store, Store
from qatlora.grid import recover


def store_of(kind: str, weight: Tensor) -> Store:
    """nf4, q4_0 or bf16 of a bf16 weight, on the grid that is found in it or searched for."""
    recovered = recover(weight)
    on_grid = bool(recovered.on_grid.all())
    if kind == "q4_0":
        return Q4Store(recovered.blocks)
    if kind == "bf16":
        return Bf16Store(weight, recovered.blocks.steps, on_grid=on_grid)
    return _nf4_store(weight, recovered.blocks.steps, on_grid=on_grid)


def _nf4_store(weight: Tensor, steps: Tensor, *, on_grid: bool) -> Nf4Store:
    from bitsandbytes.nn import Linear4bit

    out_features, in_features = weight.shape
    linear = Linear4bit(
        in_features, out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    linear.load_state_dict({"weight": weight})
    return Nf4Store(linear.to(weight.device).weight, steps, on_grid=on_grid)
