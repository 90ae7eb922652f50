"""What a run leaves: small frozen dataclasses, the only thing that reports are made from.

Units stand in the names or here: losses and KLD in nats per token, perplexity = exp(mean loss).
`report.json` is these dataclasses as JSON (`qatlora/report/schema.json`).
"""

from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1

# Names of the evaluation texts and of the models that are compared on them.
TEXTS = ("task", "general")
MODELS = ("base", "trained", "merged")


@dataclass(frozen=True)
class BaseResult:
    """The base: `on_grid_share` is the share of the trained blocks on a grid in the checkpoint."""

    name: str
    storage: str
    parameters: int
    on_grid_share: float
    digest: str


@dataclass(frozen=True)
class AdapterResult:
    """The adapter's rule and size."""

    kind: str
    rank: int
    alpha: float
    rounding: str
    dither: bool
    trainable_parameters: int
    tensors: int


@dataclass(frozen=True)
class TrainPoint:
    """One optimizer step: means over its tokens, in nats per token; None where it had none."""

    step: int
    loss: float
    ce: float | None
    kl: float | None
    general_kl: float | None
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """The training stage; `tokens` counts the tokens that carried a loss."""

    steps: int
    tokens: int
    seconds: float
    loss_first: float
    loss_last: float
    peak_rss_bytes: int
    history: list[TrainPoint] = field(default_factory=list)


@dataclass(frozen=True)
class KldFigures:
    """KLD to the teacher in nats per token; `same_top` is a share."""

    mean: float
    median: float
    p99: float
    same_top: float


@dataclass(frozen=True)
class TextResult:
    """One model on one text; `kld_histogram` counts tokens per bin of `KLD_BIN_EDGES`."""

    tokens: int
    perplexity: float
    mean_nll: float
    nll_stderr: float
    kld: KldFigures | None
    kld_histogram: list[int] | None = None


@dataclass(frozen=True)
class GateResult:
    """One gate of the guard: the figure it measured, its limit, and `passed|failed|skipped`."""

    name: str
    value: float | None
    limit: float | None
    unit: str
    status: str
    message: str


@dataclass(frozen=True)
class GuardResult:
    """All gates; `override` is the reason that published in spite of a failed one."""

    passed: bool
    gates: list[GateResult]
    override: str | None = None


@dataclass(frozen=True)
class ExportResult:
    """The published file; `tensor_types` counts tensors per GGUF type."""

    path: str
    sha256: str
    bytes: int
    tensor_types: dict[str, int]


@dataclass(frozen=True)
class LayerChange:
    """Shares of one tensor's levels and steps that the adapter changed."""

    tensor: str
    levels_changed: float
    steps_changed: float


@dataclass(frozen=True)
class Sample:
    """One held-out prompt and the answers by model name."""

    prompt: str
    answers: dict[str, str]


@dataclass(frozen=True)
class StageTime:
    """How long a stage took."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class SpeedRow:
    """One method at one size of a step.

    `time_ratio` is the median over rounds of its time over the baseline's; `peak_bytes` leaves out
    what the process held before the model was loaded; `memory_ratio_of_storage` is the ratio that
    the difference of the stored bits alone would give. None without the baseline.
    """

    method: str
    label: str
    storage: str
    tokens_per_step: int
    seconds_median: float
    seconds_min: float
    seconds_max: float
    time_ratio: float | None
    peak_bytes: int
    peak_process_bytes: int
    memory_ratio: float | None
    memory_ratio_of_storage: float | None
    trainable_parameters: int


@dataclass(frozen=True)
class SpeedResult:
    """Step time and peak memory of several methods, which took turns."""

    device: str
    threads: int
    rounds: int
    row_tokens: int
    keep_blocks: bool
    gradient_checkpointing: bool
    baseline: str
    rows: list[SpeedRow]


@dataclass(frozen=True)
class Losses:
    """A model on the three held-out texts, nats per token; the KLD is the base's to this model."""

    task: float
    validation: float
    general: float
    general_kld: float


@dataclass(frozen=True)
class MethodRun:
    """One training of one method.

    `unmerged` is the model as trained. `deployed` is what llama.cpp would run: equal for a method
    inside the grid, after a merge and llama-quantize for PEFT's own LoRA, None where that could not
    be done. `codes_changed` and `steps_changed` are shares against the base, a block and its
    negative counted as the same.
    """

    method: str
    learning_rate: float
    seed: int
    unmerged: Losses
    deployed: Losses | None
    codes_changed: float | None
    steps_changed: float | None
    trainable_parameters: int
    seconds: float


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest over the seeds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class MethodSummary:
    """A method at its best learning rate, over the seeds.

    `share` is what the deployed model gains on the task over what the bound gains of the same seed;
    the bound's own losses are unmerged, and `merged_share` is what is left of them after a merge.
    """

    method: str
    label: str
    learning_rate: float
    seeds: int
    task: Spread
    general: Spread
    general_kld: Spread
    share: Spread | None
    merged_share: Spread | None
    codes_changed: Spread | None
    steps_changed: Spread | None
    trainable_parameters: int
    seconds: Spread


@dataclass(frozen=True)
class AdaptersResult:
    """What the adapters of several methods keep on one base that lies on the grid.

    `rounded_by` is None for a base that lay on a grid already; `skipped` holds a line for each
    figure that could not be had.
    """

    rounded_by: str | None
    domain: str
    max_steps: int
    tokens_per_step: int
    before: Losses
    summaries: list[MethodSummary]
    runs: list[MethodRun]
    skipped: list[str]


@dataclass(frozen=True)
class BenchmarkResult:
    """The suite that ran; the other one is None."""

    speed: SpeedResult | None = None
    adapters: AdaptersResult | None = None


@dataclass(frozen=True)
class RunReport:
    """Everything; parts that a recipe has no stage for are None or empty."""

    recipe: str
    base: BaseResult
    adapter: AdapterResult | None = None
    train: TrainResult | None = None
    texts: dict[str, dict[str, TextResult]] = field(default_factory=dict)  # text -> model -> result
    guard: GuardResult | None = None
    export: ExportResult | None = None
    benchmark: BenchmarkResult | None = None
    changes: list[LayerChange] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    stages: list[StageTime] = field(default_factory=list)
    peak_rss_bytes: int = 0
    data_notes: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


# Bins for the histogram of per-token KLD: three per decade from 1e-6 to 100 nats, and one below.
KLD_BIN_EDGES = [0.0, *(10 ** (exponent / 3) for exponent in range(-18, 7))]
