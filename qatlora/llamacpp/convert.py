"""An HF folder to GGUF by llama.cpp's own converter, Q4_0 tensors copied block by block.

The converter maps names, permutes rows, writes the vocabulary and the metadata; here its known
traps are closed first, each of which would give a broken file without a word:

- Gemma without tokenizer.model gets a GPT-2 style vocabulary;
- token types of a SentencePiece vocabulary come from `added_tokens_decoder` of
  tokenizer_config.json, which transformers 5 no longer writes;
- a lm_head.weight that lies in the folder of a tied model unties it.
"""

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from sentencepiece import sentencepiece_model_pb2

from qatlora.errors import ExportError
from qatlora.llamacpp.pre_tokenizers import name_of
from qatlora.llamacpp.source import converter_command

OTHER_TYPES = ("q8_0", "f16", "bf16", "f32")
_SENTENCEPIECE_ONLY = ("GemmaForCausalLM", "Gemma2", "Gemma3")
_ADDED_TOKEN_KEYS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")  # a multimodal wrapper puts its own name before it
_LOG_TAIL_LINES = 12
_TIMEOUT_SECONDS = 4 * 3600


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """Where a deployed tensor lies in the GGUF file.

    row_order: element i is the row of the HF tensor that is row i of the GGUF tensor (rows of all
        leading dimensions counted through); None if they are the same.
    """

    gguf_name: str
    row_order: list[int] | None


@dataclasses.dataclass(frozen=True)
class ConvertResult:
    """A finished conversion.

    tensor_map: HF name of every tensor of deployed.safetensors to its place.
    log: what the converter said.
    """

    tensor_map: dict[str, TensorPlace]
    log: Path


def convert(
    staging: Path, output: Path, other_type: str, metadata: dict[str, str]
) -> ConvertResult:
    """Convert a staging folder to a GGUF file.

    Args:
        staging: an HF folder (config.json without quantization_config, tokenizer files,
            model*.safetensors with all tensors that are not deployed) and, unless nothing is
            deployed, `deployed.safetensors`: HF tensor names to uint8 [..., in / 32 * 18], the
            packed Q4_0 rows, copied verbatim. The folder is the caller's scratch: its
            tokenizer_config.json may be completed.
        output: written in place, not atomically; the log lies beside it as NAME.log.
        other_type: q8_0, f16, bf16 or f32, for the matrices that are not deployed. Norms are F32.
        metadata: stamped into the file as strings; `general.name` sets the model's name.

    Raises:
        ExportError: the folder is not fit for conversion, or the converter failed.
        ToolError: llama.cpp's source could not be had.
    """
    _check_staging(staging, other_type)
    _complete_added_tokens(staging)
    stamp = dict(metadata)
    request = {
        "parent": os.getpid(),
        "staging": str(staging.absolute()),
        "output": str(output.absolute()),
        "places": str(staging.absolute() / "places.json"),
        "other_type": other_type,
        "name": stamp.pop("general.name", output.stem),
        "metadata": stamp,
        "pre_tokenizer": name_of(_read_json(staging / "tokenizer.json").get("pre_tokenizer")),
    }
    request_path = staging / "request.json"
    request_path.write_text(json.dumps(request), encoding="utf-8")
    log = output.with_name(output.name + ".log")
    _run(request_path, output, log)
    places = _read_json(staging / "places.json")
    return ConvertResult({name: TensorPlace(**place) for name, place in places.items()}, log)


def _run(request: Path, output: Path, log: Path) -> None:
    command, environment = converter_command(str(request.absolute()))
    with log.open("w", encoding="utf-8") as written:
        try:
            run = subprocess.run(
                command,
                env=environment,
                stdout=written,
                stderr=subprocess.STDOUT,
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
            failure = "" if run.returncode == 0 else f"exit code {run.returncode}"
        except subprocess.TimeoutExpired:
            failure = f"not finished after {_TIMEOUT_SECONDS} s"
    if failure or not output.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ExportError(
            f"llama.cpp's converter failed ({failure or 'no file written'}). The end of its log "
            f"({log}): " + " | ".join(lines[-_LOG_TAIL_LINES:])
        )


def _check_staging(staging: Path, other_type: str) -> None:
    if other_type not in OTHER_TYPES:
        raise ExportError(f"The type {other_type!r} cannot be written: give {OTHER_TYPES}.")
    config = _read_json(staging / "config.json")
    architecture = (config.get("architectures") or ["(none)"])[0]
    if "quantization_config" in config:
        raise ExportError(
            f"{staging}/config.json has a quantization_config, by which the converter would decode "
            "tensors that are plain: remove the key."
        )
    has_model = (staging / "tokenizer.model").is_file()
    if architecture.startswith(_SENTENCEPIECE_ONLY) and not has_model:
        raise ExportError(
            f"{staging} has no tokenizer.model, without which {architecture} would get a GPT-2 "
            "style vocabulary that tokenizes wrongly: copy tokenizer.model from the base model."
        )
    # Gemma's configuration class ties by default and its config.json may be silent about it.
    tied = config.get("tie_word_embeddings", architecture.startswith("Gemma"))
    stray = next((name for name in _tensor_names(staging) if _HEAD.search(name)), None)
    if tied and stray is not None:
        raise ExportError(
            f"{staging} has a {stray} although its embeddings are tied; the GGUF would get "
            "an output matrix of its own. Leave the tensor out."
        )


def _tensor_names(staging: Path) -> Iterator[str]:
    for path in sorted(staging.glob("*.safetensors")):
        with safe_open(path, framework="np") as tensors:
            yield from tensors.keys()


def _complete_added_tokens(staging: Path) -> None:
    path = staging / "tokenizer_config.json"
    settings = _read_json(path)
    if "added_tokens_decoder" in settings:
        return
    if (staging / "tokenizer.json").is_file():
        added = _read_json(staging / "tokenizer.json").get("added_tokens", [])
    else:
        added = list(_added_pieces(staging / "tokenizer.model"))
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: token[key] for key in _ADDED_TOKEN_KEYS} for token in added
    }
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _added_pieces(path: Path) -> Iterator[dict[str, Any]]:
    """Control and user-defined pieces, in the form of tokenizer.json's `added_tokens`."""
    if not path.is_file():
        return
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    flags = dict.fromkeys(_ADDED_TOKEN_KEYS, False)
    for index, piece in enumerate(model.pieces):
        if piece.type in (piece.CONTROL, piece.USER_DEFINED):
            special = piece.type == piece.CONTROL
            yield flags | {"id": index, "content": piece.piece, "special": special}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if path.name == "tokenizer.json":  # a folder with tokenizer.model alone is complete
            return {}
        raise ExportError(f"{path} is missing: the converter needs it.")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
