"""What the recipes q4_0_build and nf4_build leave."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildResult:
    """A built folder, in the layout of `storage` (q4_0 or nf4).

    `bytes` and `source_bytes` are those of the safetensors files; `modules` counts the quantized
    linears per layer kind; `relative_error` is theirs against the source; an NF4 build was loaded
    again and wrote `continuation` after `prompt`.
    """

    path: str
    storage: str
    bytes: int
    source_bytes: int
    modules: dict[str, int]
    relative_error: float
    source_digest: str
    prompt: str | None = None
    continuation: str | None = None
