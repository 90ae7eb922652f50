"""How a model is named on the command line where several are compared.

    nf4 | q4_0 | q4_0_reference | bf16    the run's base, stored so
    PLACE                                 a model as it is stored
    PLACE@STORAGE                         a checkpoint, stored as one of those four

PLACE is a Hugging Face folder or a build of one, a run folder with an adapter, a GGUF file,
`hub:ID` or `embedded:NAME`. `q4_0` is what qatlora makes of the weights; `q4_0_reference` is
llama.cpp's rule, that is llama-quantize without an imatrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qatlora.errors import ConfigError, closest
from qatlora.paths import user_path

STORAGES = ("nf4", "q4_0", "q4_0_reference", "bf16")
BASE = "base"
"""Kind of a model that is the run's base."""

_PREFIXES = ("embedded", "hub")
_EXAMPLES = (
    "Give nf4, q4_0, q4_0_reference or bf16 (the base stored so), or a folder, a GGUF file, "
    "hub:ID or embedded:NAME, with @STORAGE behind a checkpoint"
)


@dataclass(frozen=True)
class ModelSpec:
    """One model.

    Attributes:
        text: as it was typed.
        kind: base, embedded, hub, folder, gguf or adapter.
        place: path, name or id; empty for the base.
        storage: one of STORAGES; None as it is stored.
        name: what its place is called in tables; None for the name of the file or folder.
    """

    text: str
    kind: str
    place: str = ""
    storage: str | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        """A short name for tables."""
        if self.kind == BASE:
            return str(self.storage)
        path = Path(self.place)
        if self.kind == "adapter":
            path = path.parent  # it lies in the run folder
        elif self.kind == "gguf":
            path = path.with_suffix("")
        return (self.name or path.name) + (f"@{self.storage}" if self.storage else "")


def parse_models(key: str, texts: Sequence[str]) -> list[ModelSpec]:
    """Parse a list of models.

    Args:
        key: the setting, for messages.
        texts: its value.

    Raises:
        ConfigError: none, one given twice, no such file or folder, an unknown storage, or one that
            does not fit the kind of model.
    """
    if not texts or len(set(texts)) < len(texts):
        raise ConfigError(
            f"{key}={list(texts)}: must name different models, at least one. {_EXAMPLES}."
        )
    return [_parse(key, text) for text in texts]


def parse_vanilla(place: str) -> ModelSpec:
    """The ordinary checkpoint that a QAT base was trained from, stored as NF4.

    Raises:
        ConfigError: no such folder, no checkpoint, or a storage is given with it.
    """
    (spec,) = parse_models("fidelity.vanilla", [place])
    if spec.storage is not None or spec.kind in _WHY_FIXED:
        raise ConfigError(
            f"fidelity.vanilla={place}: this must be a plain checkpoint, which is stored as NF4 "
            "for the table. Give its folder, hub:ID or embedded:NAME, without @STORAGE."
        )
    return replace(spec, text=f"{place}@nf4", storage="nf4", name="vanilla")


def _parse(key: str, text: str) -> ModelSpec:
    if text in STORAGES:
        return ModelSpec(text, BASE, storage=text)
    place, storage = _split_storage(key, text)
    prefix, colon, name = place.partition(":")
    if colon and prefix in _PREFIXES:
        return ModelSpec(text, prefix, name, storage)
    path = user_path(key, place).absolute()
    kind = _kind_of(key, text, path)
    if kind in ("gguf", "adapter") and storage is not None:
        raise ConfigError(
            f"{key}: {text!r} asks for another storage of {_WHY_FIXED[kind]}. Leave @{storage} out."
        )
    return ModelSpec(text, kind, str(_adapter_folder(path) or path), storage)


_WHY_FIXED = {
    "gguf": "a GGUF file, whose tensors have their types already",
    "adapter": "an adapter, which belongs to the storage that it was trained on",
}


def _split_storage(key: str, text: str) -> tuple[str, str | None]:
    place, at, storage = text.rpartition("@")
    if not at or "/" in storage or user_path(key, text).exists():
        return text, None
    if storage not in STORAGES:
        raise ConfigError(
            f"{key}: {text!r} has no storage {storage!r}; {closest(storage, STORAGES)}"
        )
    return place, storage


def _kind_of(key: str, text: str, path: Path) -> str:
    if path.is_file() and path.suffix.lower() == ".gguf":
        return "gguf"
    if _adapter_folder(path) is not None:
        return "adapter"
    if path.is_dir():
        return "folder"
    raise ConfigError(
        f"{key}: {text!r} is neither a storage of the base nor a folder or .gguf file; "
        f"{closest(text, STORAGES)} {_EXAMPLES}."
    )


def _adapter_folder(path: Path) -> Path | None:
    """The folder of the adapter itself, where `path` is one or a run that left one."""
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    return None
