"""A transformers model put together tensor by tensor, so that no second copy of it ever exists."""

from collections.abc import Mapping

import accelerate
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose parameters are on the meta device, and whose buffers are as computed.

    Buffers are rotary frequencies and scales of embeddings, which no checkpoint holds.
    """
    with accelerate.init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # that hook has given tied parameters copies of their own
    return model


def fill_model(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], device: torch.device
) -> PreTrainedModel:
    """Give an empty model its tensors, frozen; those that are left out stay on the meta device.

    As in transformers, weights that should be tied and are both there with other values, are not.
    """
    missing = model.state_dict().keys() - tensors.keys()
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights(missing_keys=missing)
    for buffer_name, buffer in list(model.named_buffers()):
        owner, _, name = buffer_name.rpartition(".")
        setattr(model.get_submodule(owner), name, buffer.to(device))
    return model.eval().requires_grad_(False)
