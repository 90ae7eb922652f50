"""What the recipe `benchmark` leaves; a part of `qatlora.report.results`, with the same rules."""

from dataclasses import dataclass

BOUND = "peft_bf16"
"""The method whose gain, never merged, is what shares are taken of."""


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

    @property
    def judged(self) -> Losses:
        """The losses it is judged by: as deployed; the bound's, and the unmergeable, as trained."""
        return self.unmerged if self.method == BOUND or not self.deployed else self.deployed


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
