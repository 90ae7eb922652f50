"""Several models on the same held-out texts, each against the teacher's states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from qatlora.evaluate.scores import ScoreSettings, TokenScores
from qatlora.evaluate.states import (
    KeptStates,
    ReferenceStates,
    Row,
    StatesBatch,
    reference_states,
)
from qatlora.evaluate.statistics import KldStatistics, summarize
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
        states: model name -> text name -> the states of a model that was measured to be kept.
    """

    texts: Sequence[NamedText]
    settings: ScoreSettings
    teacher: dict[str, ReferenceStates] = field(default_factory=dict)
    scores: dict[str, dict[str, TokenScores]] = field(default_factory=dict)
    states: dict[str, dict[str, ReferenceStates]] = field(default_factory=dict)

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

    def measure(
        self,
        name: str,
        model: nn.Module,
        on_tokens: OnTokens,
        *,
        keep: bool = False,
        against: str | None = None,
    ) -> dict[str, KldStatistics]:
        """Score a model under `name` on all texts against the teacher, in one pass.

        Args:
            name: its name in `scores`.
            model: Hugging Face causal LM.
            on_tokens: called with the number of tokens that were scored.
            keep: keep its states under its name, for a later comparison.
            against: a model whose states were kept.

        Returns:
            Text name -> KLD from the model `against` to this one; empty without it.
        """
        scores, roundtrip = {}, {}
        for text in self.texts:
            kept = KeptStates(model, self.settings)
            teacher = self.teacher.get(text.name)
            references = [] if teacher is None else [teacher]
            if against is not None:
                references.append(self.states[against][text.name])

            def on_batch(batch: StatesBatch, kept: KeptStates = kept) -> None:
                if keep:
                    kept.add(batch)
                on_tokens(len(batch.targets))

            found = evaluate_text(model, text.rows, references, self.settings, on_batch)
            scores[text.name] = found[0]
            if against is not None:
                roundtrip[text.name] = _kld_of(found[-1])
                if teacher is None:
                    scores[text.name] = TokenScores(found[0].nll)
            if keep:
                self.states.setdefault(name, {})[text.name] = kept.finish()
        self.scores[name] = scores
        return roundtrip

    def self_kld_max(self, model: nn.Module) -> float:
        """Largest KLD per token of a model to itself, run twice on the first rows of each text.

        Anything but 0 would mean that its figures are not repeatable.
        """
        largest = []
        for text in self.texts:
            rows = text.rows[:_SELF_KLD_ROWS]
            states = reference_states(model, rows, self.settings)
            (scores,) = evaluate_text(model, rows, [states], self.settings)
            assert scores.kld is not None
            largest.append(scores.kld.abs().max())
        return float(torch.stack(largest).max())  # unlike Python's max, NaN wins

    def kld(self, model: str, text: str) -> KldStatistics | None:
        """KLD of a measured model to the teacher; None without a teacher."""
        return summarize(self.scores[model][text]).kld

    def results(self) -> dict[str, dict[str, TextResult]]:
        """Text name -> model name -> figures for the report."""
        return {
            text.name: {model: _result(scores[text.name]) for model, scores in self.scores.items()}
            for text in self.texts
        }


def _kld_of(scores: TokenScores) -> KldStatistics:
    kld = summarize(scores).kld
    assert kld is not None
    return kld


def _result(scores: TokenScores) -> TextResult:
    summary = summarize(scores)
    kld = summary.kld
    return TextResult(
        tokens=summary.num_tokens,
        perplexity=summary.perplexity,
        mean_nll=summary.mean_nll,
        nll_stderr=summary.nll_stderr,
        kld=None if kld is None else KldFigures(kld.mean, kld.median, kld.p99, kld.same_top),
        kld_histogram=None if scores.kld is None else kld_histogram(scores.kld),
    )


def kld_histogram(kld: torch.Tensor) -> list[int]:
    """Tokens per bin of `KLD_BIN_EDGES`; what lies above the last edge is in the last bin."""
    edges = torch.tensor(KLD_BIN_EDGES, dtype=torch.float64)
    inside = kld.double().clamp(0, edges[-1] * (1 - 1e-12))
    bins = torch.bucketize(inside, edges, right=True) - 1
    return torch.bincount(bins, minlength=len(edges) - 1).tolist()
