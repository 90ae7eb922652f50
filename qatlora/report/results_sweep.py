"""What a sweep leaves: a row per run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SweepFigures:
    """One model on the held-out texts; KLD to the teacher, mean, in nats per token."""

    task_perplexity: float | None = None
    task_kld_nats: float | None = None
    general_perplexity: float | None = None
    general_kld_nats: float | None = None


@dataclass(frozen=True)
class SweepRun:
    """One run.

    Attributes:
        number: of the job, and of its folder.
        folder: the run's own.
        settings: those that differ between the runs.
        status: finished, failed or unfinished.
        reason: why it did not finish.
        seconds: wall time; None where it is unfinished.
        base: figures before training.
        final: figures of the file read back, else of the trained model.
        gates: status -> number of the guard's gates.
        failed_gates: their names.
    """

    number: int
    folder: str
    settings: dict[str, str]
    status: str
    reason: str | None
    seconds: float | None
    base: SweepFigures
    final: SweepFigures
    gates: dict[str, int]
    failed_gates: list[str]


@dataclass(frozen=True)
class SweepResult:
    """All runs of a sweep, and the settings that differ between them."""

    folder: str
    differing: list[str]
    runs: list[SweepRun]

    @property
    def num_failed(self) -> int:
        """Runs that did not finish."""
        return sum(run.status != "finished" for run in self.runs)
