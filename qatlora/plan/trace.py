"""What a forward keeps for the backward pass, counted by running it on the meta device.

No weight exists there and nothing is computed, but autograd asks for the same tensors to be kept
as on a real device. Trained linears keep their input, as `qatlora.adapters.autograd` does, and
attention its three inputs, its output and one number per head, as flash kernels do; keys and values
count once per query head, because transformers repeats them where a mask is needed. A kernel that
keeps scores of length x length (heads of 512 may get no other one) needs more than is counted here.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from qatlora.base.architectures import weight_names
from qatlora.base.names import is_stack

_ATTENTION = "traced"
_TRACED_TOKENS = 128


@dataclass(frozen=True)
class KeptPerToken:
    """Bytes kept for the backward pass by one token of a micro-batch, in bf16 autocast.

    Attributes:
        layers: by each decoder layer.
        outside: by everything besides them: embeddings, per-layer inputs, the last norm.
        layer_input: what checkpointing keeps of a layer instead.
    """

    layers: tuple[float, ...]
    outside: float
    layer_input: float

    def total(self, *, checkpointing: bool) -> float:
        """All at once; with checkpointing one layer is computed again at a time."""
        if checkpointing:
            return self.outside + len(self.layers) * self.layer_input + max(self.layers)
        return self.outside + sum(self.layers)


class _TracedLinear(nn.Module):
    """Stands in for a linear on the grid, which keeps its input only if it is trained."""

    def __init__(self, out_features: int, *, trained: bool = True) -> None:
        super().__init__()
        self.out_features, self.trained = out_features, trained
        self.parameter = nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return _KeepsInput.apply(  # type: ignore[no-any-return]
            x, self.parameter, self.out_features, self.trained
        )


class _KeepsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, out_features: int, keeps: bool) -> Tensor:
        if keeps:
            ctx.save_for_backward(x)
        return x.new_empty(*x.shape[:-1], out_features)


class _TracedExperts(nn.Module):
    """Stands in for `RoutedExperts`: as many rows as it has, whichever expert each goes to."""

    def __init__(self, name: str, experts: nn.Module, trained: Collection[str]) -> None:
        super().__init__()
        self.act_fn = experts.act_fn
        for projection, weight in experts.named_parameters(recurse=False):
            is_trained = f"{name}.{projection}" in trained
            setattr(
                self, f"traced_{projection}", _TracedLinear(weight.shape[1], trained=is_trained)
            )

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = hidden.repeat_interleave(top_k_index.shape[-1], dim=0)
        gate, up = self.traced_gate_up_proj(rows).chunk(2, dim=-1)
        share = self.traced_down_proj(self.act_fn(gate) * up) * top_k_weights.reshape(-1, 1)
        return share.unflatten(0, (len(hidden), -1)).sum(1).to(hidden.dtype)


class _KeepsAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """[rows, heads, length, head_dim] -> [rows, length, heads, head_dim]."""
    groups = query.shape[1] // key.shape[1]
    repeated = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    return _KeepsAttention.apply(query, *repeated).transpose(1, 2), None


def kept_per_token(skeleton: PreTrainedModel, trained: Collection[str]) -> KeptPerToken:
    """Run one row through the decoder of a model on the meta device; the model is used up.

    Args:
        skeleton: on the meta device, in bf16; its trained weights are replaced.
        trained: their names.
    """
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
    skeleton.requires_grad_(False)
    stacks = [name for name in weight_names(skeleton) if is_stack(name)]
    for name in {name.rpartition(".")[0] for name in stacks}:
        traced = _TracedExperts(name, skeleton.get_submodule(name), trained)
        skeleton.set_submodule(name, traced)
    for name in (name for name in trained if not is_stack(name)):
        skeleton.set_submodule(name, _TracedLinear(skeleton.get_submodule(name).out_features))
    skeleton.set_attn_implementation(_ATTENTION)
    decoder = skeleton.train().get_decoder()
    counted = _Counter(decoder)
    ids = torch.zeros(1, _TRACED_TOKENS, dtype=torch.int64, device="meta")
    # Without a mask transformers would look at the positions for packed rows, and there are none.
    mask = torch.ones_like(ids)
    with counted.watching(decoder.layers):
        decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    per_token = {place: num / _TRACED_TOKENS for place, num in counted.num_bytes.items()}
    outside = per_token.pop(None, 0.0)
    hidden = skeleton.config.get_text_config().hidden_size
    return KeptPerToken(
        layers=tuple(per_token.get(i, 0.0) for i in range(len(decoder.layers))),
        outside=outside,
        layer_input=hidden * torch.bfloat16.itemsize,
    )


class _Counter:
    """Bytes that autograd keeps, by the layer whose forward asks for them; shared ones once."""

    def __init__(self, decoder: nn.Module) -> None:
        self.num_bytes: dict[int | None, int] = defaultdict(int)
        self._layer: int | None = None
        weights = [*decoder.parameters(), *decoder.buffers()]
        self._seen = {weight.untyped_storage()._cdata: weight for weight in weights}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # alive, so that its address is not used again
            self.num_bytes[self._layer] += storage.nbytes()
        return tensor

    def _enter(self, index: int | None) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._layer = index

        return hook

    @contextmanager
    def watching(self, layers: nn.ModuleList) -> Iterator[None]:
        hooks = [layer.register_forward_pre_hook(self._enter(i)) for i, layer in enumerate(layers)]
        hooks += [layer.register_forward_hook(self._enter(None)) for layer in layers]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()
