"""Final hidden states of Hugging Face models over rows of tokens.

A model's scores need its final hidden states and its head, no logits; and a reference that many
models are compared with is run once and kept as hidden states, 1.3 kB per token for a width of 640
in bf16, where logits over 262,144 words would be 512 kB.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from qatlora import memory
from qatlora.distill import LmHead
from qatlora.distill.losses import IGNORED_LABEL
from qatlora.errors import CheckpointError, DataError
from qatlora.evaluate.scores import ScoreSettings


class Row(Protocol):
    """A window of text; it begins with BOS where the tokenizer has one."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Tokens."""

    @property
    def labels(self) -> Sequence[int]:
        """The same tokens, -100 where a token is not scored."""


@dataclass(frozen=True)
class ReferenceStates:
    """A reference model on a text, without the model.

    Attributes:
        hidden: [n, H] states that predict the n scored tokens, in the compute dtype, on the CPU.
        targets: [n] int64, the scored tokens.
        head: the reference's head.
    """

    hidden: Tensor
    targets: Tensor
    head: LmHead

    def first(self, num_tokens: int) -> "ReferenceStates":
        """The reference on the first scored tokens."""
        return ReferenceStates(self.hidden[:num_tokens], self.targets[:num_tokens], self.head)


@dataclass(frozen=True)
class StatesBatch:
    """The scored positions of a few windows: hidden [n, H] and the words that follow [n]."""

    hidden: Tensor
    targets: Tensor


def final_hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Run the decoder up to its final norm: what lm_head takes in.

    Args:
        model: Hugging Face causal LM; plain, wrapped by PEFT, or the text side of a multimodal one.
        input_ids: [N, L] int64 on the model's device.
        attention_mask: [N, L], 0 for padding; None for none.
        position_ids: [N, L], without a mask: a new sequence begins wherever they do not go on.

    Returns:
        [N, L, H], with a graph if gradients are enabled; no logits are computed.
    """
    decoder = _decoder(model)
    output = decoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


class KeptStates:
    """Collects a model's states batch by batch, to make a reference of it."""

    def __init__(self, model: nn.Module, settings: ScoreSettings) -> None:
        self._head = LmHead.of(model)
        self._dtype = settings.compute_dtype
        self._hidden: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, batch: StatesBatch) -> None:
        """Take in the next batch of the text."""
        self._hidden.append(batch.hidden.to("cpu", self._dtype))
        self._targets.append(batch.targets.cpu())

    def finish(self) -> ReferenceStates:
        """The whole text."""
        return ReferenceStates(torch.cat(self._hidden), torch.cat(self._targets), self._head)


def reference_states(
    model: nn.Module,
    rows: Sequence[Row],
    settings: ScoreSettings | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> ReferenceStates:
    """Run a reference over rows and keep the states of the scored positions.

    `on_tokens(n)` is called after each batch with its number of scored tokens.
    """
    settings = settings or ScoreSettings()
    kept = KeptStates(model, settings)
    for batch in scored_states(model, rows, settings):
        kept.add(batch)
        if on_tokens is not None:
            on_tokens(len(batch.targets))
    return kept.finish()


def scored_states(
    model: nn.Module, rows: Sequence[Row], settings: ScoreSettings
) -> Iterator[StatesBatch]:
    """Yield the states of the scored positions, a batch of windows at a time, in text order.

    The model is in eval mode while it runs. Results depend on the batching by rounding, so compare
    models with equal settings.

    Raises:
        DataError: no token of the rows is scored.
    """
    device = next(model.parameters()).device
    if not any(label != IGNORED_LABEL for row in rows for label in row.labels[1:]):
        raise DataError(
            f"None of the {len(rows)} rows has a token to score: labels are -100 everywhere. "
            "Give held-out text with assistant turns that fit the maximum length."
        )
    with memory.freed_kept():
        for group in _batches(rows, settings.batch_tokens):
            input_ids, labels, mask = _pad(group, device)
            with _evaluating(model), _precision(settings, device):
                hidden = final_hidden_states(model, input_ids, mask)
            following = labels[:, 1:]
            scored = following != IGNORED_LABEL
            if scored.any():
                yield StatesBatch(hidden[:, :-1][scored], following[scored])


def _decoder(model: nn.Module) -> nn.Module:
    """Find the part of a causal LM whose output goes into lm_head; of a multimodal one its text.

    A wrapper looks for places of images among the tokens and masks attention by them; a text has
    none, and the GGUF is the text decoder alone.
    """
    unwrap = getattr(model, "get_base_model", None)
    causal_lm = unwrap() if callable(unwrap) else model
    get_decoder = getattr(causal_lm, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if not isinstance(decoder, nn.Module) or decoder is causal_lm:
        raise CheckpointError(
            f"{type(causal_lm).__name__} has no decoder below its output layer. Pass a Hugging "
            "Face model with an lm_head (AutoModelForCausalLM)."
        )
    return decoder


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Group consecutive rows so that rows x longest stays within `batch_tokens`."""
    group: list[Row] = []
    for row in rows:
        longest = max(len(other.input_ids) for other in [*group, row])
        if group and longest * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _pad(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad to the right; no mask for windows of one length, which have a faster attention."""
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    longest = int(lengths.max())
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for i, row in enumerate(rows):
        input_ids[i, : lengths[i]] = torch.as_tensor(row.input_ids)
        labels[i, : lengths[i]] = torch.as_tensor(row.labels)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    on_device = None if bool(mask.all()) else mask.to(device)
    return input_ids.to(device), labels.to(device), on_device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, dropout off; the modes of all modules are restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _precision(settings: ScoreSettings, device: torch.device) -> torch.autocast:
    enabled = settings.autocast and settings.compute_dtype == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
