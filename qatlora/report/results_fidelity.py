"""What the recipe `fidelity` leaves; a part of `qatlora.report.results`, with the same rules."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KldStatistics:
    """KL(reference || model) over tokens, in nats per token, as llama-perplexity defines them.

    `same_top` is the share of tokens with the same most probable word; `rms_dp` the root mean
    square of P_model(token) - P_reference(token).
    """

    mean: float
    mean_stderr: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float
    min: float
    same_top: float
    same_top_stderr: float
    rms_dp: float
    rms_dp_stderr: float


@dataclass(frozen=True)
class PositionMean:
    """Mean KLD of the tokens at positions start .. stop - 1 of their windows."""

    start: int
    stop: int
    tokens: int
    mean: float
    stderr: float


@dataclass(frozen=True)
class FidelityText:
    """A model on a text beside its reference; `ratio` is perplexity over the reference's."""

    tokens: int
    perplexity: float
    perplexity_stderr: float
    reference_perplexity: float
    reference_perplexity_stderr: float
    ratio: float
    ratio_stderr: float
    kld: KldStatistics
    histogram: list[int]
    by_position: list[PositionMean]


@dataclass(frozen=True)
class WorstToken:
    """A token with a large KLD, in its context.

    `before` and `token` are the text; the two tops are the likeliest words of reference and model
    at this place, the two probabilities those of `token`. `row` and `position` count from 0.
    """

    text: str
    row: int
    position: int
    kld: float
    before: str
    token: str
    reference_top: str
    model_top: str
    reference_probability: float
    probability: float


@dataclass(frozen=True)
class LlamaCppLine:
    """A line of llama-perplexity --kl-divergence and the same figure of ours; `label` as printed.

    Units are the program's: nats, and percent for Δp, same top and correlation. An error is None
    where the program prints none.
    """

    label: str
    ours: float
    ours_error: float | None
    llama_cpp: float
    llama_cpp_error: float | None


@dataclass(frozen=True)
class LlamaCppText:
    """A GGUF in llama.cpp on full `windows` of a text, `tokens` of them scored."""

    windows: int
    tokens: int
    lines: list[LlamaCppLine]


@dataclass(frozen=True)
class FidelityModel:
    """A model against its reference.

    `title` says what it is as public model cards do: checkpoint → what it was stored as. `before`
    names the row of an adapter run's untrained base; `llama_cpp` holds, by text, what a GGUF is in
    llama.cpp.
    """

    name: str
    title: str
    given: str
    reference: str
    bytes: int
    texts: dict[str, FidelityText]
    worst: list[WorstToken]
    before: str | None = None
    llama_cpp: dict[str, LlamaCppText] = field(default_factory=dict)

    @property
    def mean_kld(self) -> float:
        """Mean over the texts of the mean KLD: what models are ranked by."""
        return sum(text.kld.mean for text in self.texts.values()) / len(self.texts)

    @property
    def mean_kld_stderr(self) -> float:
        """Standard error of `mean_kld`."""
        return math.hypot(*(text.kld.mean_stderr for text in self.texts.values())) / len(self.texts)


@dataclass(frozen=True)
class FidelityReference:
    """A reference and the largest KLD of it to itself, run twice, which must be 0."""

    name: str
    given: str
    bytes: int
    self_kld_max: float


@dataclass(frozen=True)
class FidelityResult:
    """All models, each against one of the references, on the same tokens in `precision`."""

    references: list[FidelityReference]
    models: list[FidelityModel]
    window_tokens: int
    precision: str

    def ranked(self, reference: str) -> list[FidelityModel]:
        """The models of one reference, the nearest first."""
        found = [model for model in self.models if model.reference == reference]
        return sorted(found, key=lambda model: model.mean_kld)
