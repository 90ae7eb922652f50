"""Write safetensors files of a bounded size with an index, one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qatlora import files
from qatlora.base.layout import Layout


class ShardWriter:
    """Collects tensors and writes a file whenever the next one would exceed the size.

    At most one file's tensors are in memory. A single file is called model.safetensors; several
    get numbers and an index, as transformers writes them.
    """

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor on the CPU; it may be written now or later."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_bytes:
            self._write()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes

    def add_all(self, tensors: Mapping[str, Tensor]) -> None:
        """Take several."""
        for name, tensor in tensors.items():
            self.add(name, tensor)

    def close(self) -> None:
        """Write what is left, name the files by their number and write the index."""
        if self._pending:
            self._write()
        if len(self._shards) == 1:
            self._numbered(1).rename(self._folder / "model.safetensors")
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._numbered(number).rename(self._folder / final)
            places |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
        files.write_json(self._folder / "model.safetensors.index.json", index)

    def _write(self) -> None:
        self._shards.append(list(self._pending))
        path = self._numbered(len(self._shards))
        save_file(self._pending, path, metadata={"format": "pt"})
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _numbered(self, number: int) -> Path:
        """The name of a file while the number of all files is not known yet."""
        return self._folder / f"shard-{number:05d}.safetensors"


def kept_in_bf16(layout: Layout, key: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor that a build does not code; none of a stray head, which would untie the model."""
    if layout.tied and key == "lm_head.weight":
        return {}
    return {key: tensor.bfloat16() if tensor.is_floating_point() else tensor}
