"""Everything about an architecture that memory depends on, counted on the meta device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qatlora.base.architectures import matching_weights, tensor_lists
from qatlora.base.names import weight_key
from qatlora.grid import BLOCK_SIZE
from qatlora.plan.trace import KeptPerToken, kept_per_token


@dataclass(frozen=True)
class ModelShape:
    """Counts of one architecture with its three lists.

    Attributes:
        num_parameters: of the whole checkpoint, tied ones once.
        num_text_parameters: of the text decoder and lm_head alone, which is what a GGUF holds.
        num_embeddings: of them the input embeddings, per-layer ones included.
        max_grid_weights: of the largest weight of the Q4_0 list, a stack of experts being one.
        grid: [out, in] of the matrices that are Q4_0 in the GGUF; of each expert's, too.
        nf4: [out, in] of those that storage=nf4 keeps as NF4.
        trained: [out, in] of those that get an adapter.
        vocab_size: words of lm_head.
        hidden_size: width of the final hidden states.
        kept: what a token keeps for the backward pass.
    """

    num_parameters: int
    num_text_parameters: int
    num_embeddings: int
    max_grid_weights: int
    grid: tuple[tuple[int, int], ...]
    nf4: tuple[tuple[int, int], ...]
    trained: tuple[tuple[int, int], ...]
    vocab_size: int
    hidden_size: int
    kept: KeptPerToken

    @property
    def num_grid_weights(self) -> int:
        """Weights of the Q4_0 list."""
        return num_weights(self.grid)

    @property
    def num_head_weights(self) -> int:
        """Weights of lm_head."""
        return self.vocab_size * self.hidden_size

    def adapter_parameters(self, kind: str, rank: int, steps_rank: int) -> int:
        """Parameters of an adapter: two factors over [out, in], and over [out, in / 32]."""
        levels = sum(rank * (out + width) for out, width in self.trained)
        steps = sum(steps_rank * (out + width // BLOCK_SIZE) for out, width in self.trained)
        return {"lora": levels, "steps": steps, "both": levels + steps}[kind]


def num_weights(matrices: tuple[tuple[int, int], ...]) -> int:
    """Weights of matrices [out, in]."""
    return sum(out * width for out, width in matrices)


def model_shape(config: PreTrainedConfig, trained: list[str] | None = None) -> ModelShape:
    """Count a configuration; no weight is read or made.

    Args:
        config: of any supported architecture.
        trained: regular expressions in place of the architecture's trained list.

    Raises:
        CheckpointError: unknown architecture, or nothing matches.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lists = tensor_lists(config.model_type, trained)
    names = {
        key: matching_weights(skeleton, pattern)
        for key, pattern in (("grid", lists.q4_0), ("nf4", lists.nf4), ("trained", lists.trained))
    }
    sizes = {key: tuple(_matrices(skeleton, found)) for key, found in names.items()}
    decoder, head = skeleton.get_decoder(), skeleton.get_output_embeddings().weight
    text = {id(parameter): parameter.numel() for parameter in [*decoder.parameters(), head]}
    embeddings = (module for module in decoder.modules() if isinstance(module, nn.Embedding))
    return ModelShape(
        num_parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        num_text_parameters=sum(text.values()),
        max_grid_weights=max(
            skeleton.get_parameter(weight_key(name)).numel() for name in names["grid"]
        ),
        num_embeddings=sum(module.weight.numel() for module in embeddings),
        vocab_size=head.shape[0],
        hidden_size=head.shape[1],
        kept=kept_per_token(skeleton, names["trained"]),  # uses the skeleton up
        **sizes,
    )


def _matrices(skeleton: nn.Module, names: list[str]) -> Iterator[tuple[int, int]]:
    """[out, in] of each linear, and of each expert of a stack."""
    for name in names:
        *stacked, out, width = skeleton.get_parameter(weight_key(name)).shape
        yield from [(out, width)] * math.prod(stacked)
