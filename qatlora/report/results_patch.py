"""What an export with export.patch=true leaves besides the GGUF, and recipe=apply_patch takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PatchResult:
    """A step patch: `base` and the patch make the exported file.

    Attributes:
        path: the patch.
        bytes: its size.
        base: the GGUF of the base.
        base_bytes: its size.
        base_sha256: of that file; another one is refused.
        result_sha256: of the exported file.
    """

    path: str
    bytes: int
    base: str
    base_bytes: int
    base_sha256: str
    result_sha256: str
