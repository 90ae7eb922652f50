"""What llama.cpp itself said about a candidate, as dataclasses of the report."""

from dataclasses import dataclass

TEACHER_FP32 = "teacher, fp32"
TRAINED_FP32 = "trained, fp32"
CANDIDATE_F32 = "file, as F32"
CANDIDATE = "file"
CONTROL = "llama-quantize"
BASE = "base, llama-quantize"


@dataclass(frozen=True)
class RuntimeKld:
    """KL(reference || model) in nats per token; `same_top` and `rms_dp` are shares."""

    mean: float
    stderr: float
    median: float
    p99: float
    same_top: float
    rms_dp: float


@dataclass(frozen=True)
class RuntimeRow:
    """One model on the windows.

    Attributes:
        model: one of the names above.
        perplexity, perplexity_stderr: of the scored tokens.
        to_trained: KLD from the trained model in fp32; None for that model itself, the teacher
            and the base.
        to_teacher: KLD from the teacher in fp32; None where it was not measured.
    """

    model: str
    perplexity: float
    perplexity_stderr: float
    to_trained: RuntimeKld | None
    to_teacher: RuntimeKld | None


@dataclass(frozen=True)
class RuntimeResult:
    """Held-out general text: `windows` of `window_tokens`, the second half of each scored."""

    windows: int
    window_tokens: int
    scored_tokens: int
    rows: list[RuntimeRow]
