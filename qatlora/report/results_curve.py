"""Scores on held-out text while a model trains."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CurveScores:
    """A model on the first tokens of a held-out text.

    Attributes:
        text: name of the text.
        tokens: scored tokens, the same ones for every model.
        mean_nll: nats per token.
        nll_stderr: its standard error.
        perplexity: exp(mean_nll).
        kld_mean: KL(teacher || model), nats per token; None without a teacher.
        kld_stderr: its standard error.
    """

    text: str
    tokens: int
    mean_nll: float
    nll_stderr: float
    perplexity: float
    kld_mean: float | None
    kld_stderr: float | None


@dataclass(frozen=True, kw_only=True)
class CurvePoint(CurveScores):
    """The deployed model after `step` optimizer steps."""

    step: int


@dataclass(frozen=True, kw_only=True)
class CurveLevel(CurveScores):
    """A model that stays as it is: the teacher, or llama.cpp's Q4_0 of the checkpoint."""

    model: str
