"""Licence and maker of a base, from the card in its own folder; nothing is guessed.

The card is README.md with YAML between two lines of dashes, as the Hugging Face hub has it. A GGUF
that is unpacked gets one from its metadata (`write_card`), so that all bases are read alike and
llama.cpp's converter takes the facts over into the exported file.
"""

from pathlib import Path
from typing import Any

import yaml

from qatlora import files
from qatlora.llamacpp.gguf_read import GgufFile
from qatlora.report.results_origin import OriginResult

_CARD = "README.md"
_FENCE = "---"
_AUTHOR_KEYS = ("organization", "author", "model_creator")
# Of a GGUF's metadata, without "general.", and what the card calls it.
_GGUF_KEYS = {
    "license": "license",
    "license.name": "license_name",
    "license.link": "license_link",
    "author": "author",
    "organization": "organization",
}


def origin_of(folder: Path, hub_id: str | None) -> OriginResult:
    """What the folder of a base tells.

    Args:
        folder: of the checkpoint.
        hub_id: its id on the hub, where it was fetched from there.
    """
    front = _front_matter(folder / _CARD)
    return OriginResult(
        hub_id=hub_id,
        licence=_text(front.get("license")),
        licence_name=_text(front.get("license_name")),
        licence_link=_text(front.get("license_link")),
        author=next(filter(None, (_text(front.get(key)) for key in _AUTHOR_KEYS)), None),
    )


def write_card(gguf: GgufFile, folder: Path) -> None:
    """Write the facts of a GGUF's metadata as the card of the folder that it is unpacked to."""
    stored = {name: _text(gguf.metadata.get(f"general.{key}")) for key, name in _GGUF_KEYS.items()}
    front = {name: value for name, value in stored.items() if value is not None}
    if front:
        text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
        said = f"Unpacked from {gguf.path.name}, whose metadata say what stands above."
        files.write_text(folder / _CARD, f"{_FENCE}\n{text}{_FENCE}\n\n{said}\n")


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the head of a card; empty where there is none that can be read."""
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        end = lines.index(_FENCE)
        front = yaml.safe_load("\n".join(lines[:end])) if first.strip() == _FENCE else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}


def _text(value: object) -> str | None:
    """A value as text; the hub allows a list of licences."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or None
    return str(value) if isinstance(value, str | int | float) and str(value).strip() else None
