"""Run llama.cpp's converter with some tensors handed over as finished Q4_0 blocks.

This file is a script: it runs in a process of its own, with llama.cpp's gguf-py (newer than the
gguf package of the registry) and its `conversion` package on the path, and imports nothing of
qatlora.

    python -P converter_driver.py --check
    python -P converter_driver.py request.json

The converter does more to a tensor than rename it: for Llama it interleaves the rows of q_proj and
k_proj. Instead of repeating its rules, the driver sends two probes of the tensor's shape through
the converter's own `modify_tensors`: one whose values are row numbers, one whose values are column
numbers. The rows of the blocks follow the first; anything done to the columns is refused, because
blocks lie along them.
"""

import ctypes
import functools
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from gguf.utility import SafetensorsLocal

_BLOCK, _BLOCK_BYTES = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_0]
_ARCHITECTURES = (
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration",
    "LlamaForCausalLM",
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MAX_EXACT = 1 << 24  # row and column numbers must be exact in float32
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


class DriverError(Exception):
    """Something that the driver refuses; its text is shown to the user."""


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """Write the GGUF file; returns where each deployed tensor went.

    Args:
        request: staging, output (paths), other_type, name, metadata (str to str), parent (the
            process id of the run), and pre_tokenizer: the name to fall back to for an unknown
            byte-level vocabulary, or None.
    """
    staging = Path(request["staging"])
    hparams = ModelBase.load_hparams(staging, is_mistral_format=False)
    architecture = get_model_architecture(hparams, ModelType.TEXT)
    model_class = _deployed(get_model_class(architecture), request)
    with torch.inference_mode():
        model = model_class(
            staging,
            _FILE_TYPES[request["other_type"]],
            Path(request["output"]),
            model_name=request["name"],
        )
        model.write()
    return model.places


def _deployed(converter: type[ModelBase], request: dict[str, Any]) -> type[ModelBase]:
    """The converter's class for the architecture, with our tensors, stamp and file type."""

    class Deployed(converter):
        model_arch = converter.model_arch

        def prepare_tensors(self) -> None:
            self.places = _write_deployed(self)
            super().prepare_tensors()
            if self.places:
                self.ftype = gguf.LlamaFileType.MOSTLY_Q4_0

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            for key, value in request["metadata"].items():
                self.gguf_writer.add_string(key, value)

        @functools.cache  # noqa: B019 - one instance per process
        def _create_vocab_sentencepiece(self) -> Any:
            # Asked for twice, for the embedding and for the vocabulary: seconds for 262,144 pieces.
            return super()._create_vocab_sentencepiece()

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            # The converter knows byte-level vocabularies by a hash of token ids, so it has never
            # heard of a new vocabulary, however ordinary its rule.
            try:
                return super().get_vocab_base_pre(tokenizer)
            except NotImplementedError:
                if request["pre_tokenizer"] is None:
                    raise
                return request["pre_tokenizer"]

    return Deployed


def _write_deployed(model: ModelBase) -> dict[str, Any]:
    path = model.dir_model / "deployed.safetensors"
    if not path.is_file():
        return {}
    places = {}
    with SafetensorsLocal(path) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            packed = tensors[name]
            *rows, row_bytes = packed.shape
            columns = row_bytes // _BLOCK_BYTES * _BLOCK
            gguf_name, shape, order = _place(model, name, (*rows, columns))
            # A copy-on-write map of the file: nothing is read before the writer asks for it.
            data = packed.mmap_bytes().view(np.uint8).reshape(-1, row_bytes)
            identity = len(order) == len(data) and bool(np.all(order == np.arange(len(data))))
            data = data if identity else data[order]
            model.gguf_writer.add_tensor(
                gguf_name,
                data.reshape(*shape[:-1], row_bytes),
                raw_dtype=gguf.GGMLQuantizationType.Q4_0,
            )
            places[name] = {
                "gguf_name": gguf_name,
                "row_order": None if identity else order.tolist(),
            }
    return places


def _place(
    model: ModelBase, name: str, shape: tuple[int, ...]
) -> tuple[str, tuple[int, ...], np.ndarray]:
    """Name and shape of the tensor in the GGUF, and the source row of each of its rows."""
    *rows, columns = shape
    num_rows = int(np.prod(rows))
    if max(num_rows, columns) > _MAX_EXACT:
        raise DriverError(f"{name} has {num_rows} rows, more than {_MAX_EXACT} can be tracked.")
    row_numbers = torch.arange(num_rows, dtype=torch.float32).reshape(*rows, 1).expand(shape)
    column_numbers = torch.arange(columns, dtype=torch.float32).expand(shape)
    gguf_name, row_probe = _modified(model, name, row_numbers)
    if row_probe is row_numbers:  # only renamed
        return gguf_name, shape, np.arange(num_rows)
    _, column_probe = _modified(model, name, column_numbers)
    order = row_probe.reshape(-1, row_probe.shape[-1])[:, 0]
    untouched = (
        row_probe.shape[-1] == columns
        and bool((row_probe == order.reshape(*row_probe.shape[:-1], 1)).all())
        and bool((column_probe == torch.arange(columns)).all())
    )
    if not untouched:
        raise DriverError(
            f"The converter changes the columns of {name} (as {gguf_name}); Q4_0 blocks lie along "
            "them and cannot follow. Leave this tensor out of the Q4_0 list."
        )
    return gguf_name, tuple(row_probe.shape), order.to(torch.int64).numpy()


def _modified(model: ModelBase, name: str, probe: torch.Tensor) -> tuple[str, torch.Tensor]:
    kept = model.filter_tensors((name, lambda: probe))
    if kept is None:
        raise DriverError(f"The converter drops {name}. Leave it out of the Q4_0 list.")
    renamed, generate = kept
    block = next((int(part) for part in renamed.split(".") if part.isdecimal()), None)
    results = list(model.modify_tensors(generate(), renamed, block))
    if len(results) != 1:
        raise DriverError(
            f"The converter makes {len(results)} tensors of {name}; only one to one can be "
            "handed over as blocks. Leave this tensor out of the Q4_0 list."
        )
    return results[0]


def _end_with_parent(parent: int) -> None:
    """Be killed with the run that waits for this process, as the next one writes where it does.

    Raises:
        DriverError: that run has ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise DriverError("the run that called the converter has ended")


def main(arguments: list[str]) -> int:
    """Entry point; see the head of the file."""
    if arguments == ["--check"]:
        for architecture in _ARCHITECTURES:
            get_model_class(architecture)
        return 0
    logging.basicConfig(level=logging.INFO)
    request_path = Path(arguments[0])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    try:
        _end_with_parent(request["parent"])
        places = convert(request)
    except DriverError as error:
        print(f"DriverError: {error}", file=sys.stderr)
        return 1
    Path(request["places"]).write_text(json.dumps(places), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
