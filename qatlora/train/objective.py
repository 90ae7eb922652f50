"""From the settings to the loss: weights, divergence, teacher."""

import torch
from transformers import PreTrainedModel

from qatlora.config import TeacherConfig
from qatlora.distill import Divergence, LossSettings
from qatlora.train.trainer import Objective


def build_objective(
    settings: TeacherConfig, teacher: PreTrainedModel | None, compute_dtype: torch.dtype
) -> Objective:
    """The weighted sum of cross-entropy and forward KL to the teacher."""
    return Objective(
        weights=(settings.ce_weight, settings.kl_weight, settings.general_kl_weight),
        divergence=Divergence(temperature=settings.temperature),
        teacher=teacher,
        settings=LossSettings(compute_dtype=compute_dtype),
    )
