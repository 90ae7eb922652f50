"""Losses over a frozen output head, and the teachers they follow."""

from qatlora.config import DivergenceKind
from qatlora.distill.cache import CacheWriter, TeacherCache
from qatlora.distill.cache_index import CacheKey
from qatlora.distill.divergence import Divergence
from qatlora.distill.head import LmHead
from qatlora.distill.losses import ChunkedLoss, LossSettings, chunked_loss
from qatlora.distill.teachers import Teacher, TeacherReader, TeacherStates
from qatlora.distill.top_words import TopWords, divergence_by_top_k, top_words

__all__ = [
    "CacheKey",
    "CacheWriter",
    "ChunkedLoss",
    "Divergence",
    "DivergenceKind",
    "LmHead",
    "LossSettings",
    "Teacher",
    "TeacherCache",
    "TeacherReader",
    "TeacherStates",
    "TopWords",
    "chunked_loss",
    "divergence_by_top_k",
    "top_words",
]
