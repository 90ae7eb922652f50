"""What a run leaves: small frozen dataclasses, the only thing that reports are made from.

Units stand in the names or here: losses and KLD in nats per token, perplexity = exp(mean loss).
`report.json` is these dataclasses as JSON (`qatlora/report/schema.json`).
"""

from dataclasses import dataclass, field
from typing import Any

from qatlora.report.results_benchmark import BenchmarkResult
from qatlora.report.results_build import BuildResult
from qatlora.report.results_cache import CacheResult
from qatlora.report.results_curve import CurveLevel, CurvePoint
from qatlora.report.results_doctor import DoctorResult
from qatlora.report.results_fidelity import FidelityResult
from qatlora.report.results_inspect import InspectResult
from qatlora.report.results_origin import OriginResult
from qatlora.report.results_patch import PatchResult
from qatlora.report.results_plan import PlanResult
from qatlora.report.results_preview import PreviewResult
from qatlora.report.results_runtime import RuntimeResult
from qatlora.report.results_validate import ValidateResult

SCHEMA_VERSION = 1

# Names of the evaluation texts and of the models that are compared on them.
TEXTS = ("task", "general")
MODELS = ("base", "trained", "merged")
# Measured by some recipes only: llama.cpp's own Q4_0 of the bf16 weights.
REFERENCE = "reference"
# Known by its states alone; its perplexity stands beside theirs.
TEACHER = "teacher"


@dataclass(frozen=True)
class BaseResult:
    """The base: `on_grid_share` is the share of the trained blocks on a grid in the checkpoint.

    `storage` and `digest` (of steps and latents in memory) are None where no model was loaded.
    """

    name: str
    storage: str | None
    parameters: int
    on_grid_share: float | None
    digest: str | None


@dataclass(frozen=True)
class AdapterResult:
    """The adapter's rule and size.

    Attributes:
        kind: lora, steps or both.
        rank: of the level delta; None where no level moves, as are alpha and rounding.
        alpha: its scale is alpha / rank.
        rounding: of the levels: frozen or reference.
        dither: whether levels are rounded with it.
        steps_rank: of the factor of the steps; None where none moves.
        trainable_parameters: number of them.
        tensors: number of those that are trained.
    """

    kind: str
    rank: int | None
    alpha: float | None
    rounding: str | None
    dither: bool
    steps_rank: int | None
    trainable_parameters: int
    tensors: int


@dataclass(frozen=True)
class LatentsResult:
    """Weights that were trained themselves: where their steps come from, and how many they are."""

    steps: str
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
    """The training stage; `tokens` counts those with a loss, `curve` has held-out scores."""

    steps: int
    tokens: int
    seconds: float
    loss_first: float
    loss_last: float
    peak_rss_bytes: int
    history: list[TrainPoint] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)


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
class CheckpointResult:
    """A HF folder on its grid; `differing_blocks`: recovered otherwise than they were deployed."""

    path: str
    bytes: int
    on_grid_share: float
    differing_blocks: int


@dataclass(frozen=True)
class LayerChange:
    """Shares of one tensor's levels and steps that training changed."""

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
class RunReport:
    """Everything; parts that a recipe has no stage for are None or empty."""

    recipe: str
    base: BaseResult | None  # None where none is looked at
    origin: OriginResult | None = None
    build: BuildResult | None = None
    teacher_cache: CacheResult | None = None
    adapter: AdapterResult | None = None
    latents: LatentsResult | None = None
    train: TrainResult | None = None
    texts: dict[str, dict[str, TextResult]] = field(default_factory=dict)  # text -> model -> result
    guard: GuardResult | None = None
    runtime: RuntimeResult | None = None
    export: ExportResult | None = None
    patch: PatchResult | None = None
    inspect: InspectResult | None = None
    validate: ValidateResult | None = None
    preview: PreviewResult | None = None
    checkpoint: CheckpointResult | None = None
    benchmark: BenchmarkResult | None = None
    plan: PlanResult | None = None
    fidelity: FidelityResult | None = None
    doctor: DoctorResult | None = None
    curve_levels: list[CurveLevel] = field(default_factory=list)
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
