"""A fast reader of GGUF files (little-endian, versions 2 and 3).

`gguf.GGUFReader` makes several numpy objects per array element and needs 24 s for the header of a
model with 262,144 tokens; this one reads it in well under a second. Nothing of a tensor is read
before somebody looks at it: the data are slices of one memory map.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from qatlora.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALAR_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_SCALARS = {kind: struct.Struct("<" + letter) for kind, letter in _SCALAR_FORMATS.items()}
_UINT32, _UINT64 = _SCALARS[4], _SCALARS[10]
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_ARRAY_NESTING = 4
_DEFAULT_ALIGNMENT = 32
# Fewest bytes that one entry can take: key length + type + 1 byte; name length + the four fields.
_MIN_METADATA_BYTES = 8 + 4 + 1
_MIN_TENSOR_INFO_BYTES = 8 + 4 + 4 + 8


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor, still encoded.

    shape: row-major (torch order, the contraction dimension last), in weights.
    data: uint8 [*shape[:-1], bytes per row], a slice of the file's memory map.
    start: place of the first byte in the file.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    start: int

    @property
    def num_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def rows(self, start: int, stop: int) -> "GgufTensor":
        """The part start..stop of the first dimension (not for one-dimensional tensors)."""
        data, first = self.data[start:stop], self.start + start * self.data[0].nbytes
        return dataclasses.replace(self, shape=(len(data), *self.shape[1:]), data=data, start=first)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """Header of a GGUF file: metadata as Python values, tensors by name.

    header_bytes: without the padding before the data.
    alignment: of the data, in bytes.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    header_bytes: int = 0
    alignment: int = _DEFAULT_ALIGNMENT

    @property
    def data_start(self) -> int:
        """Place of the first tensor's first byte."""
        return -(-self.header_bytes // self.alignment) * self.alignment

    def require(self, key: str) -> Any:
        """The metadata value of `key`; CheckpointError if the file has none."""
        if key not in self.metadata:
            raise CheckpointError(
                f"{self.path} has no metadata key {key!r}, which a model of its kind needs; "
                "the file is incomplete: convert the model again with a current llama.cpp."
            )
        return self.metadata[key]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file and map its tensors.

    Raises:
        CheckpointError: the file is missing, truncated, of another version or byte order, or
            announces sizes that it cannot hold.
    """
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return _Cursor(path, m).read_file()
    except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
        raise CheckpointError(
            f"{path} cannot be read as GGUF ({error}): give a GGUF file."
        ) from None


def dequantize(tensor: GgufTensor) -> NDArray[np.float32]:
    """Decode to float32 [*shape] with llama.cpp's own formulas (gguf.quants)."""
    kind = gguf.GGMLQuantizationType[tensor.type_name]
    try:
        decoded = gguf.quants.dequantize(tensor.data, kind)
    except NotImplementedError:
        raise CheckpointError(
            f"Tensor {tensor.name} is stored as {tensor.type_name}, which the gguf package cannot "
            "decode; use a file with another quantization (for example Q8_0 or BF16)."
        ) from None
    return decoded.astype(np.float32, copy=False).reshape(tensor.shape)


class _Cursor:
    """Position in the mapped file; every read is checked against its end."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._size = len(view)
        self._at = 0

    def read_file(self) -> GgufFile:
        num_tensors, num_metadata = self._read_counts()
        metadata: dict[str, Any] = {}
        for _ in range(num_metadata):
            key = self._string()
            if key in metadata:
                raise self._broken(f"has the metadata key {key!r} twice")
            metadata[key] = self._value(self._scalar(_UINT32))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self._broken(f"has general.alignment {alignment!r}, which is no power of two")
        header = GgufFile(self._path, metadata, {}, self._at, alignment)
        tensors = self._map_tensors(infos, header.data_start, alignment)
        return dataclasses.replace(header, tensors=tensors)

    def _read_counts(self) -> tuple[int, int]:
        magic = self._bytes(4)
        if magic != _MAGIC:
            raise self._broken(f"starts with {magic!r} instead of {_MAGIC!r}: it is no GGUF file")
        version = self._scalar(_UINT32)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian" if swapped in _VERSIONS else f"of version {version}"
            raise self._broken(f"is {kind}; only little-endian versions 2 and 3 can be read")
        num_tensors, num_metadata = self._scalar(_UINT64), self._scalar(_UINT64)
        self._check_count(num_metadata, _MIN_METADATA_BYTES, "metadata entries")
        self._check_count(num_tensors, _MIN_TENSOR_INFO_BYTES, "tensors")
        return num_tensors, num_metadata

    def _tensor_info(self) -> tuple[str, tuple[int, ...], str, int]:
        name = self._string()
        num_dimensions = self._scalar(_UINT32)
        if num_dimensions > _MAX_DIMENSIONS:
            raise self._broken(f"gives tensor {name!r} {num_dimensions} dimensions (at most 4)")
        sizes = [self._scalar(_UINT64) for _ in range(num_dimensions)]
        kind = self._scalar(_UINT32)
        try:
            type_name = gguf.GGMLQuantizationType(kind).name
        except ValueError:
            raise self._broken(f"gives tensor {name!r} the unknown type {kind}") from None
        # GGUF lists the contraction dimension first; torch and numpy have it last.
        return name, tuple(reversed(sizes)), type_name, self._scalar(_UINT64)

    def _map_tensors(
        self, infos: list[tuple[str, tuple[int, ...], str, int]], data_start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        # np.memmap opens the file once more: its pages stay valid when this cursor is gone.
        content = np.memmap(self._path, dtype=np.uint8, mode="r")
        tensors: dict[str, GgufTensor] = {}
        expected = 0  # llama.cpp, too, reads only tensors that lie one after the other
        for name, shape, type_name, offset in infos:
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
            columns = shape[-1] if shape else 1
            if columns % block:
                raise self._broken(f"gives {name!r} {columns} columns, no multiple of {block}")
            row_bytes = columns // block * block_bytes
            num_bytes = math.prod(shape[:-1]) * row_bytes
            start = data_start + offset
            if offset != expected or start + num_bytes > self._size:
                raise self._broken(
                    f"places tensor {name!r} ({num_bytes} bytes) at offset {start}, outside of its "
                    f"{self._size} bytes or not just after the tensor before it"
                )
            expected = -(-(offset + num_bytes) // alignment) * alignment
            if name in tensors:
                raise self._broken(f"has the tensor {name!r} twice")
            data = content[start : start + num_bytes].reshape(*shape[:-1], row_bytes)
            tensors[name] = GgufTensor(name, type_name, shape, data, start)
        return tensors

    def _value(self, kind: int, nesting: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(nesting + 1)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        raise self._broken(f"has a metadata value of the unknown type {kind}")

    def _array(self, nesting: int) -> list[Any]:
        if nesting > _MAX_ARRAY_NESTING:
            raise self._broken(f"nests metadata arrays deeper than {_MAX_ARRAY_NESTING}")
        kind, count = self._scalar(_UINT32), self._scalar(_UINT64)
        if kind in _SCALARS:
            size = _SCALARS[kind].size
            self._check_count(count, size, "array elements")
            return list(
                struct.unpack(f"<{count}{_SCALAR_FORMATS[kind]}", self._bytes(count * size))
            )
        self._check_count(count, 8, "array elements")
        return [self._value(kind, nesting) for _ in range(count)]

    def _string(self) -> str:
        length = self._scalar(_UINT64)
        self._check_count(length, 1, "bytes of text")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken(f"has text at byte {self._at - length} that is no UTF-8") from None

    def _scalar(self, layout: struct.Struct) -> Any:
        return layout.unpack(self._bytes(layout.size))[0]

    def _bytes(self, count: int) -> bytes:
        end = self._at + count
        if end > self._size:
            raise self._broken(f"ends at byte {self._size} in the middle of its header")
        part = self._view[self._at : end]
        self._at = end
        return part

    def _check_count(self, count: int, min_bytes: int, what: str) -> None:
        left = self._size - self._at
        if count * min_bytes > left:
            raise self._broken(f"announces {count} {what} but only {left} bytes follow")

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path} {what}. The file is damaged, cut off or of another kind: download or "
            "convert it again."
        )
