"""What recipe=plan leaves: bytes by part, what fits which GPU, and what to take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedStorage:
    """One storage of the base, with the settings of the run.

    Attributes:
        storage: nf4, q4_0 or bf16.
        parts: part -> bytes, as `qatlora.plan.footprint.Footprint` explains them.
        peaks: load, train, evaluate, export -> bytes.
    """

    storage: str
    parts: dict[str, float]
    peaks: dict[str, float]


@dataclass(frozen=True)
class Fits:
    """The longest row of tokens per GPU size, in the order of `PlanResult.gpu_gb`; None: none.

    `adapter` is lora, steps, both, or weights, where these are trained themselves.
    """

    storage: str
    adapter: str
    teacher: str
    row_tokens: list[int | None]


@dataclass(frozen=True)
class Recommendation:
    """Settings for one GPU: what to type, line by line, and their peak in bytes."""

    gpu_gb: float
    commands: list[str]
    peak_bytes: float | None


@dataclass(frozen=True)
class PlanResult:
    """Memory of a base, on the meta device.

    Attributes:
        bf16_bytes: the whole checkpoint.
        q4_0_bytes: its text part with every matrix, embeddings too, in Q4_0.
        micro_batch_tokens: of the run's settings.
        storages: bytes of the run's settings by storage.
        gpu_gb: sizes of GPUs, in 2^30 bytes.
        fits: longest rows; one row per micro-batch, checkpointing on, nothing held.
        recommended: for `plan.gpu_gb`.
    """

    bf16_bytes: float
    q4_0_bytes: float
    micro_batch_tokens: int
    storages: list[PlannedStorage]
    gpu_gb: list[float]
    fits: list[Fits]
    recommended: Recommendation
