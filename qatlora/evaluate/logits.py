"""Logits of a model in float32, a few rows at a time: for files and programs that ask for them.

Losses and scores never need them; llama.cpp's base files do.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qatlora.distill import LmHead
from qatlora.evaluate.scores import ScoreSettings
from qatlora.evaluate.states import Row, scored_states

_ROWS_AT_ONCE = 32
_BATCH_TOKENS = 1024


def scored_logits(model: nn.Module, rows: Sequence[Row]) -> Iterator[NDArray[np.float32]]:
    """Yield float32 [r, V], the logits that predict the scored tokens, in text order.

    Args:
        model: Hugging Face causal LM in float32.
        rows: windows of text.
    """
    settings = ScoreSettings(batch_tokens=_BATCH_TOKENS, compute_dtype=torch.float32)
    head = LmHead.of(model)
    for batch in scored_states(model, rows, settings):
        for hidden in batch.hidden.split(_ROWS_AT_ONCE):
            yield head.logits(hidden, torch.float32).cpu().numpy()
