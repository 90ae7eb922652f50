"""What a step patch says of itself: which files it belongs to, and what lay beside the result."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qatlora.errors import ExportError
from qatlora.grid import GRID_VERSION

_KIND = "qatlora step patch"
FORMAT = f"{_KIND} 2"


@dataclass(frozen=True)
class PatchHead:
    """What a patch belongs to; all values are text, as safetensors keeps them.

    Attributes:
        format: FORMAT.
        grid_version: version of the numerics.
        base_sha256: of the GGUF that it is applied to.
        base_name: name of that file, for people.
        result_sha256: of the GGUF that it makes.
        result_name: name of that file.
        header_start: first byte of the base's header that is replaced.
        header_stop: first byte after those.
        card: model card of the file that it makes, as its maker wrote it.
        stops: JSON list of the texts that end an answer of that model.
    """

    format: str
    grid_version: str
    base_sha256: str
    base_name: str
    result_sha256: str
    result_name: str
    header_start: str
    header_stop: str
    card: str
    stops: str

    def stop_texts(self) -> list[str]:
        """The texts of `stops`.

        Raises:
            ValueError: they are no such list.
        """
        texts = json.loads(self.stops)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{self.stops[:80]!r} is no list of texts")
        return texts


@dataclass(frozen=True)
class Beside:
    """What tells people how to use an exported file: its model card, and where answers end."""

    card: str
    stops: list[str]


def read_head(patch: Path) -> PatchHead:
    """What a patch says of itself.

    Raises:
        ExportError: it is no patch, damaged, or of another version.
    """
    with opened(patch) as tensors:
        stored = tensors.metadata() or {}
    kind, grid = stored.get("format", ""), stored.get("grid_version")
    if not kind.startswith(_KIND):  # other safetensors files have a format, too
        raise no_patch(patch, f"its metadata are {sorted(stored)}")
    if (kind, grid) != (FORMAT, str(GRID_VERSION)):
        raise ExportError(
            f"{patch} is a '{kind}' of grid version {grid}, and this qatlora applies '{FORMAT}' "
            f"of {GRID_VERSION}. Use the qatlora that wrote it."
        )
    try:
        head = PatchHead(**stored)
        head.stop_texts()
    except (TypeError, ValueError) as problem:
        raise no_patch(patch, f"in its metadata, {problem}") from None
    name = head.result_name
    if Path(name).name != name or not name.endswith(".gguf") or not name.isprintable():
        raise no_patch(patch, f"it would write to {head.result_name!r}")
    return head


def opened(patch: Path) -> Any:
    """The patch as safetensors shows it.

    Raises:
        ExportError: it is no such file.
    """
    try:
        return safe_open(patch, framework="pt")
    except (SafetensorError, OSError) as problem:
        raise no_patch(patch, str(problem)) from None


def no_patch(patch: Path, why: str) -> ExportError:
    """The refusal of a file that is damaged or another one."""
    return ExportError(
        f"{patch} is no whole step patch ({why}): it is damaged or another file. Give the "
        "*.patch.safetensors file that an export with export.patch=true wrote."
    )
