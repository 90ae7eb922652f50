"""The frozen output layer of a language model: hidden state to logits, softcap included.

Losses and evaluation work on final hidden states and this object, never on a model's `logits`:
those of a whole batch would be gigabytes for a vocabulary of 262,144 words.

Shapes: T tokens, H hidden size, V words of the vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qatlora.distill.matmul import multiply_transposed
from qatlora.errors import CheckpointError

# Words per product of `logits`: bounds the converted copy of the weight to a few MB.
_WORDS_PER_SLICE = 16_384


@dataclass(frozen=True)
class LmHead:
    """Weights of a frozen lm_head.

    Attributes:
        weight: [V, H], float; no gradient ever reaches it.
        bias: [V] or None.
        softcap: logits become softcap * tanh(logits / softcap); None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> "LmHead":
        """Take the head of a Hugging Face causal LM, plain, multimodal or wrapped by PEFT.

        The tensors are shared with the model, tied embeddings included.

        Raises:
            CheckpointError: the output layer is absent, quantized, or wrapped by an adapter.
        """
        layer = model.get_output_embeddings()
        weight = getattr(layer, "weight", None)
        if type(layer) is not nn.Linear or weight is None or not weight.is_floating_point():
            raise CheckpointError(
                f"The output layer lm_head is a {type(layer).__name__} and not a float nn.Linear. "
                "Losses and evaluation multiply by its plain weight: keep lm_head out of "
                "quantization (llm_int8_skip_modules) and out of the adapter's targets."
            )
        config = model.config.get_text_config()
        _refuse_scaled_logits(config)
        cap = getattr(config, "final_logit_softcapping", None)
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(weight.detach(), bias, float(cap) if cap else None)

    @property
    def vocab_size(self) -> int:
        """V, padding words included."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.weight.shape[1]

    def to(self, dtype: torch.dtype) -> "LmHead":
        """Return a head whose weight has `dtype`; itself, without a copy, if it has it already."""
        if self.weight.dtype == dtype:
            return self
        return replace(self, weight=self.weight.to(dtype))

    def apart(self) -> "LmHead":
        """A head that outlives its model without keeping the rest of it in memory.

        On a CPU the weight may be a part of a mapped file, all of which would stay mapped.
        """
        if self.weight.device.type != "cpu":
            return self
        return replace(self, weight=self.weight.clone())

    def logits(self, hidden: Tensor, compute_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the logits [T, V] of hidden states [T, H]: for a chunk of tokens, not for a text.

        Factors are rounded to `compute_dtype`; the result is float32 (float64 for float64).
        """
        spans = range(0, self.vocab_size, _WORDS_PER_SLICE)
        parts = [self.logits_of_words(hidden, i, _WORDS_PER_SLICE, compute_dtype) for i in spans]
        return torch.cat(parts, dim=1)

    def logits_of_words(
        self,
        hidden: Tensor,
        start: int,
        count: int,
        compute_dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the columns [T, start:start+count] of `logits`, in `out` if it is given."""
        rows = self.weight[start : start + count]
        raw = multiply_transposed(hidden, rows, compute_dtype, out)
        return self.finish_(raw, start)

    def finish_(self, raw: Tensor, start: int = 0) -> Tensor:
        """Apply bias and softcap in place to raw products [T, n] of the words from `start` on."""
        if self.bias is not None:
            raw += self.bias[start : start + raw.shape[1]].to(raw.dtype)
        if self.softcap is not None:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw


def _refuse_scaled_logits(config: object) -> None:
    """Cohere and Granite multiply their logits by a constant, which `LmHead` does not know."""
    for key in ("logit_scale", "logits_scaling"):
        value = getattr(config, key, None)
        if value not in (None, 1.0):
            raise CheckpointError(
                f"The model's config has {key}={value}: its logits are scaled after lm_head, which "
                "qatlora does not reproduce. Use a Gemma 3, Gemma 4 or Llama-shaped model."
            )
