"""Several models on the same held-out texts, each against the teacher's states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from qatlora.distill import LmHead
from qatlora.evaluate.scores import ScoreSettings, TokenScores
from qatlora.evaluate.states import ReferenceStates, Row, reference_states
from qatlora.evaluate.statistics import KldSummary, summarize
from qatlora.evaluate.text import evaluate_text
from qatlora.report.results import KLD_BIN_EDGES, KldFigures, TextResult

_SELF_KLD_ROWS = 2

OnTokens = Callable[[int], None]


class NamedText(Protocol):
    """A held-out text: its name and its windows."""

    @property
    def name(self) -> str:
        """`task` or `general`."""

    @property
    def rows(self) -> Sequence[Row]:
        """Windows of tokens with the labels that are scored."""


@dataclass
class Evaluation:
    """Scores by model and text; the teacher is kept as hidden states only.

    Attributes:
        texts: what is scored.
        settings: batch sizes and precision, the same for every model.
        teacher: text name -> the teacher's states; empty without a teacher.
        scores: model name -> text name -> scores per token, KLD to the teacher.
    """

    texts: Sequence[NamedText]
    settings: ScoreSettings
    teacher: dict[str, ReferenceStates] = field(default_factory=dict)
    scores: dict[str, dict[str, TokenScores]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Scored tokens of all texts."""
        return sum(
            label != -100 for text in self.texts for row in text.rows for label in row.labels
        )

    def states_of(self, model: nn.Module, on_tokens: OnTokens) -> dict[str, ReferenceStates]:
        """Run a model over all texts and keep its final hidden states."""
        return {
            text.name: reference_states(model, text.rows, self.settings, on_tokens)
            for text in self.texts
        }

    def measure(self, name: str, model: nn.Module, on_tokens: OnTokens) -> None:
        """Score a model under `name` on all texts against the teacher."""
        head = LmHead.of(model)
        self.scores[name] = {
            text.name: evaluate_text(
                model, head, text.rows, self.teacher.get(text.name), self.settings, on_tokens
            )
            for text in self.texts
        }

    def divergence(
        self, reference: dict[str, ReferenceStates], model: nn.Module, on_tokens: OnTokens
    ) -> dict[str, KldSummary]:
        """KLD of a model from any other model's states, text by text."""
        head = LmHead.of(model)
        summaries = {}
        for text in self.texts:
            scores = evaluate_text(
                model, head, text.rows, reference[text.name], self.settings, on_tokens
            )
            kld = summarize(scores).kld
            assert kld is not None
            summaries[text.name] = kld
        return summaries

    def self_kld_max(self, model: nn.Module) -> float:
        """Largest KLD per token of a model to itself, run twice on the first rows of each text.

        Anything but 0 would mean that its figures are not repeatable.
        """
        head, largest = LmHead.of(model), []
        for text in self.texts:
            rows = text.rows[:_SELF_KLD_ROWS]
            states = reference_states(model, rows, self.settings)
            kld = evaluate_text(model, head, rows, states, self.settings).kld
            assert kld is not None
            largest.append(kld.abs().max())
        return float(torch.stack(largest).max())  # unlike Python's max, NaN wins

    def kld(self, model: str, text: str) -> KldSummary | None:
        """KLD of a measured model to the teacher; None without a teacher."""
        return summarize(self.scores[model][text]).kld

    def results(self) -> dict[str, dict[str, TextResult]]:
        """Text name -> model name -> figures for the report."""
        return {
            text.name: {model: _result(scores[text.name]) for model, scores in self.scores.items()}
            for text in self.texts
        }


def _result(scores: TokenScores) -> TextResult:
    summary = summarize(scores)
    kld = summary.kld
    return TextResult(
        tokens=summary.num_tokens,
        perplexity=summary.perplexity,
        mean_nll=summary.mean_nll,
        nll_stderr=summary.nll_stderr,
        kld=None if kld is None else KldFigures(kld.mean, kld.median, kld.p99, kld.same_top),
        kld_histogram=None if scores.kld is None else _histogram(scores.kld),
    )


def _histogram(kld: torch.Tensor) -> list[int]:
    """Tokens per bin of `KLD_BIN_EDGES`; what lies above the last edge is in the last bin."""
    edges = torch.tensor(KLD_BIN_EDGES, dtype=torch.float64)
    inside = kld.double().clamp(0, edges[-1] * (1 - 1e-12))
    bins = torch.bucketize(inside, edges, right=True) - 1
    return torch.bincount(bins, minlength=len(edges) - 1).tolist()
