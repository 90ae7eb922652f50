"""What recipe=validate found, as dataclasses of the report."""

from dataclasses import dataclass, field

BY_LLAMA_CPP = "Q4_0 by llama-quantize"
BY_GRID = "Q4_0 by qatlora"
GGUF = "gguf"


@dataclass(frozen=True)
class KeptEffect:
    """What an export keeps of a merge; 1 is all of it.

    Attributes:
        by_loss: of the fall of the held-out loss; None where it did not fall clearly.
        by_kld: 1 - KL(merged || export) / KL(merged || base); None where nothing moved.
        kld: KL(merged || export), nats per token.
    """

    by_loss: float | None
    by_kld: float | None
    kld: float


@dataclass(frozen=True)
class TypeDamage:
    """The trained tensors in a GGUF type.

    Attributes:
        type: its name.
        relative_error: sqrt(sum (decoded - w)^2 / sum w^2); None where it overflows.
        exact_share: share of blocks of 32 that come back to the last bit as they are stored.
    """

    type: str
    relative_error: float | None
    exact_share: float


@dataclass(frozen=True)
class ValidateResult:
    """A checkpoint or a file before it is published.

    Attributes:
        what: merged, adapter or gguf.
        path: what was given.
        base: folder of the base.
        kept: export -> what it keeps; empty for a GGUF alone.
        types: damage by GGUF type, of the trained tensors.
        warnings: sentences.
        advice: command that does it better, None where all is well.
    """

    what: str
    path: str
    base: str
    kept: dict[str, KeptEffect] = field(default_factory=dict)
    types: list[TypeDamage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    advice: str | None = None
