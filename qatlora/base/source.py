"""Where a base comes from: an embedded package, a HF folder, a GGUF file or a hub id -> a folder.

Everything here is cheap: it looks at names, headers and config.json, so that a broken checkpoint
is found before any weight is read.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qatlora.base.intact import WEIGHTS, check_index, require_sum, require_sums
from qatlora.base.names import model_name
from qatlora.base.record import STEPS_FILE, GridRecord, check_tensors, read_record
from qatlora.base.unpack import embedded_base, unpack_gguf
from qatlora.config import BaseConfig
from qatlora.errors import CheckpointError, first_line
from qatlora.paths import cache_folder

_NF4_SUFFIX = ".weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Source:
    """An ordinary HF checkpoint folder and what its headers say.

    Attributes:
        name: how people call this base.
        folder: config.json, safetensors, tokenizer.
        config: the parsed config.json.
        files: tensor name -> safetensors file that holds it; names are the loaded model's.
        stored_names: those of the tensors whose name in the file is another one.
        nf4_modules: modules stored as bitsandbytes NF4; empty for an ordinary checkpoint.
        record: what a build of ours knows of the grid of its source, else None.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]
    nf4_modules: frozenset[str]
    record: GridRecord | None = None
    stored_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def packed_modules(self) -> frozenset[str]:
        """Modules stored as packed Q4_0; empty unless this is a packed build."""
        packed = self.record is not None and self.record.storage == "q4_0"
        return frozenset(self.record.blocks) if packed else frozenset()

    @property
    def model_type(self) -> str:
        """`model_type` of config.json."""
        return str(self.config["model_type"])

    @property
    def text_config(self) -> dict[str, Any]:
        """config.json, of a multimodal model the part of its decoder."""
        text: dict[str, Any] = self.config.get("text_config", self.config)
        return text

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer, padding included."""
        return self._text_size("vocab_size")

    @property
    def num_head_weights(self) -> int:
        """Weights of the output layer, tied or not."""
        return self.vocab_size * self._text_size("hidden_size")

    def _text_size(self, key: str) -> int:
        value = self.text_config.get(key)
        if not isinstance(value, int):
            raise CheckpointError(
                f"{self.folder / 'config.json'} has {value!r} as {key} of its text model, which "
                "must be a number. Fetch it again."
            )
        return value

    @property
    def weight_bytes(self) -> int:
        """Size of all safetensors files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def model_name(self, stored: str) -> str:
        """The loaded model's name of a tensor called `stored` in its file."""
        return model_name(stored, self.model_type)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers."""
        shapes = {}
        for path in sorted(set(self.files.values())):
            with safe_open(path, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    shapes[self.model_name(key)] = tuple(opened.get_slice(key).get_shape())
        return shapes

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: the checkpoint has no tensor of this name.
        """
        if name not in self.files:
            raise CheckpointError(
                f"{self.folder} has no tensor '{name}', which its config.json calls for. The "
                "folder is incomplete or belongs to another model: download it again."
            )
        require_sum(self.files[name])
        with safe_open(self.files[name], framework="pt") as opened:
            return opened.get_tensor(self.stored_names.get(name, name))

    def tensor_with_parts(self, name: str) -> dict[str, Tensor]:
        """A tensor and those whose names go on behind its own: scales and code books of NF4."""
        keys = [key for key in self.files if key == name or key.startswith(f"{name}.")]
        return {key: self.tensor(key) for key in keys}

    def steps(self, name: str) -> Tensor:
        """The steps that an NF4 build with a record keeps of its source: float16 [out, in / 32]."""
        require_sum(self.folder / STEPS_FILE)
        with safe_open(self.folder / STEPS_FILE, framework="pt") as opened:
            return opened.get_tensor(f"{name}.steps")


def find_source(settings: BaseConfig, chat_template: str | None = None) -> Source:
    """Resolve `base.*` to a checked folder; a GGUF is unpacked once into the cache.

    Args:
        settings: which checkpoint.
        chat_template: Jinja text for an unpacked GGUF; None keeps its own.

    Raises:
        CheckpointError: the checkpoint is missing, broken or of an unsupported kind.
    """
    folder = _folder_of(settings, chat_template)
    return read_source(folder, settings.name or folder.name)


def read_source(folder: Path, name: str) -> Source:
    """Describe and check a HF folder by its config.json and headers.

    Raises:
        CheckpointError: it is broken or of an unsupported kind.
    """
    require_sums(folder, lambda name: not name.endswith(WEIGHTS))
    config = _read_config(folder)
    check_index(folder)
    record = read_record(folder, config)
    found: dict[str, Path] = {}
    for key, path in _tensor_files(folder):
        if key in found:
            raise CheckpointError(
                f"{folder} holds the tensor '{key}' twice, in {found[key].name} and {path.name}: "
                "which of them is meant is not known. Remove the file that is left from another "
                "version of the checkpoint."
            )
        found[key] = path
    if record is not None:
        try:
            check_tensors(folder, record, found)
        except CheckpointError:
            require_sums(folder, lambda name: True)  # rather names the file than what it lacks
            raise
    names = {
        key: model_name(key, config["model_type"])
        for key, path in found.items()
        if path.name != STEPS_FILE
    }
    files = {called: found[key] for key, called in names.items()}
    renamed = {called: key for key, called in names.items() if called != key}
    nf4 = frozenset(key.removesuffix(_NF4_SUFFIX) for key in files if key.endswith(_NF4_SUFFIX))
    return Source(name, folder, config, files, nf4, record, renamed)


def _folder_of(settings: BaseConfig, chat_template: str | None) -> Path:
    if settings.path is None:
        if settings.embedded:
            return embedded_base(settings.embedded, chat_template)
        if settings.hub_id:
            return _from_hub(settings.hub_id, ["*"])
        raise CheckpointError(
            "No base was given: set base=NAME (a file of conf/base), base.path=DIR or base.hub_id."
        )
    path = Path(settings.path)
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        status = path.stat()
        identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        key = hashlib.sha256(identity.encode()).hexdigest()[:12]
        target = cache_folder() / "bases" / f"{path.stem}-{key}"
        return target if target.is_dir() else unpack_gguf(path, target, chat_template)
    raise CheckpointError(
        f"base.path is '{path}', which is neither a folder nor a .gguf file. Give the folder that "
        "holds config.json and the safetensors files, or a GGUF of a Gemma 3 or Llama-shaped model."
    )


def hub_config(hub_id: str) -> Path:
    """A folder with the config.json of a model on the hub; its weights stay there.

    Raises:
        CheckpointError: there is no such model, or no network.
    """
    return _from_hub(hub_id, ["config.json"])


def _from_hub(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    others = ["*.bin", "*.pt", "*.gguf", "original/*"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=others))
    except Exception as problem:  # the client raises a dozen classes; all mean "not to be had"
        raise CheckpointError(
            f"'{hub_id}' could not be fetched from the hub ({type(problem).__name__}: "
            f"{first_line(problem)}). Where there is a network, accept the model's terms "
            "and log in with 'hf auth login'; else download it elsewhere and give base.path=FOLDER."
        ) from problem


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, so it is no HF checkpoint. Give the folder that holds "
            "config.json, model.safetensors and the tokenizer files."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_type"]
    except (ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(
            f"{path} cannot be used ({type(problem).__name__}: {problem}): it must be a JSON "
            "object with a model_type. Download the checkpoint again."
        ) from None
    return config


def _tensor_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (tensor name, file) from the headers; a truncated file is found here."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(
            f"{folder} holds no .safetensors file. Only safetensors are read (a pickle can run "
            "code): convert the checkpoint with transformers' save_pretrained."
        )
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield key, shard
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(
                f"{shard} is no whole safetensors file ({problem}). It was probably cut off while "
                "being copied: fetch it again."
            ) from None
