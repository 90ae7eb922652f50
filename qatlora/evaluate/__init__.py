"""Perplexity and KL divergence of Hugging Face models, from hidden states."""

from qatlora.evaluate.scores import Reference, ScoreSettings, TokenScores, score_tokens
from qatlora.evaluate.states import (
    ReferenceStates,
    Row,
    final_hidden_states,
    reference_states,
)
from qatlora.evaluate.statistics import (
    KldStatistics,
    Mean,
    PerplexityRatio,
    TextScores,
    mean_difference,
    mean_of,
    percentile,
    summarize,
)
from qatlora.evaluate.text import evaluate_text

__all__ = [
    "KldStatistics",
    "Mean",
    "PerplexityRatio",
    "Reference",
    "ReferenceStates",
    "Row",
    "ScoreSettings",
    "TextScores",
    "TokenScores",
    "evaluate_text",
    "final_hidden_states",
    "mean_difference",
    "mean_of",
    "percentile",
    "reference_states",
    "score_tokens",
    "summarize",
]
