"""The baselines: PEFT's own LoRA on a base that knows no grid.

The same rank, alpha, modules and float32 factors as ours; nothing else of qatlora is in their
forward. On NF4 this is QLoRA as everybody runs it; on bf16 it is LoRA beside the exact weights.
"""

from dataclasses import dataclass

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qatlora.adapters.model import ParameterGroups
from qatlora.config import AdapterConfig


@dataclass(frozen=True)
class PlainPeft:
    """A model with PEFT's LoRA, in the shape that the training room takes.

    Attributes:
        model: the PEFT model.
        tokenizer: the checkpoint's.
        modules: names of the adapted linears.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    modules: tuple[str, ...]

    def keep_blocks(self, keep: bool) -> None:
        """Nothing to keep: there are no blocks."""

    def parameter_groups(self) -> ParameterGroups:
        """All of them learn at the rate of the levels."""
        return ParameterGroups([p for p in self.model.parameters() if p.requires_grad], [])

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Module name -> what merging adds to its weight, float32 [out, in]."""
        inner = self.model.get_base_model()
        return {name: _delta(inner.get_submodule(name)) for name in self.modules}


def attach_plain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    modules: tuple[str, ...],
    settings: AdapterConfig,
    seed: int,
) -> PlainPeft:
    """Put PEFT's LoRA on `modules` of a frozen model."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides it by the rank
        lora_dropout=0.0,
        bias="none",
        target_modules=list(modules),
        task_type="CAUSAL_LM",
    )
    # PEFT chooses its 4-bit layer by this mark, and Trainer and TRL cast factors to bf16 by it.
    model.is_loaded_in_4bit = any(isinstance(layer, Linear4bit) for layer in model.modules())
    adapted = get_peft_model(model, config)
    model.is_loaded_in_4bit = False
    return PlainPeft(adapted, tokenizer, modules)


def _delta(layer: nn.Module) -> Tensor:
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
    return (up @ down).mul_(layer.scaling[name])
