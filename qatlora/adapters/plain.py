"""The deployed model as a plain transformers model in float32, which holds its weights exactly."""

import torch
from torch import nn
from transformers import PreTrainedModel

from qatlora.adapters.model import GridModel
from qatlora.base.load import load_plain
from qatlora.base.others import deploy_others
from qatlora.base.plain import put_weight
from qatlora.grid import decode


@torch.no_grad()
def deployed_model(adapted: GridModel, other_type: str, device: torch.device) -> PreTrainedModel:
    """Load the source anew and put the deployed blocks, decoded, in the places of its linears.

    Nothing of an exported file is read: it is what that file is compared with.

    Args:
        adapted: the trained model.
        other_type: GGUF type of the other matrices (see `deploy_others`).
        device: where the model goes.
    """
    model = load_plain(adapted.base.source.folder, device, torch.float32)
    for name, blocks in adapted.deployed():
        put_weight(model, name, decode(blocks, torch.float32).to(device))
    nn.Module.float(
        model
    )  # the rest of an NF4 build comes in bf16; transformers' own float refuses
    deploy_others(model, adapted.base.grid, other_type)
    return model
