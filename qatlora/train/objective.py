"""From the settings to the loss: weights, divergence, teacher."""

import torch

from qatlora.config import TeacherConfig
from qatlora.distill import Divergence, LossSettings
from qatlora.train.teachers import BatchTeacher
from qatlora.train.trainer import Objective


def build_objective(
    settings: TeacherConfig, teacher: BatchTeacher | None, compute_dtype: torch.dtype
) -> Objective:
    """The weighted sum of cross-entropy and divergence from the teacher."""
    return Objective(
        weights=(settings.ce_weight, settings.kl_weight, settings.general_kl_weight),
        divergence=divergence_of(settings),
        teacher=teacher,
        settings=LossSettings(compute_dtype=compute_dtype),
    )


def divergence_of(settings: TeacherConfig) -> Divergence:
    """The divergence that the settings name."""
    return Divergence(settings.divergence, settings.temperature, settings.beta)
