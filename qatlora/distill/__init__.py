"""Losses over a frozen output head, and the teachers they follow."""

from qatlora.distill.divergence import Divergence, DivergenceKind
from qatlora.distill.head import LmHead
from qatlora.distill.losses import ChunkedLoss, LossSettings, chunked_loss
from qatlora.distill.teachers import Teacher, TeacherReader, TeacherStates

__all__ = [
    "ChunkedLoss",
    "Divergence",
    "DivergenceKind",
    "LmHead",
    "LossSettings",
    "Teacher",
    "TeacherReader",
    "TeacherStates",
    "chunked_loss",
]
