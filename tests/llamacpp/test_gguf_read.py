import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from qatlora.errors import CheckpointError
from qatlora.llamacpp.gguf_read import GgufFile, dequantize, read_gguf

VALUES = {
    "a.uint8": (gguf.GGUFValueType.UINT8, 200),
    "a.int8": (gguf.GGUFValueType.INT8, -100),
    "a.uint16": (gguf.GGUFValueType.UINT16, 60_000),
    "a.int16": (gguf.GGUFValueType.INT16, -30_000),
    "a.uint32": (gguf.GGUFValueType.UINT32, 1 << 31),
    "a.int32": (gguf.GGUFValueType.INT32, -5),
    "a.uint64": (gguf.GGUFValueType.UINT64, 1 << 63),
    "a.int64": (gguf.GGUFValueType.INT64, -(1 << 62)),
    "a.float32": (gguf.GGUFValueType.FLOAT32, 0.1),
    "a.float64": (gguf.GGUFValueType.FLOAT64, 0.1),
    "a.bool": (gguf.GGUFValueType.BOOL, True),
    "a.string": (gguf.GGUFValueType.STRING, "käse 🧀"),
}
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0")


def write_sample(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in VALUES.items():
        writer.add_key_value(key, value, kind)
    writer.add_array("b.ints", [1, -2, 3])
    writer.add_array("b.floats", [0.5, 2.5])
    writer.add_array("b.texts", ["", "two", "▁drei"])
    rng = np.random.default_rng(0)
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        weights = rng.standard_normal((3, 4, 64)).astype(np.float32)
        writer.add_tensor(f"t.{name}", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("t.vector", rng.standard_normal(7).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_equal_to_the_reference_reader(ours: GgufFile, reference: gguf.GGUFReader) -> None:
    expected = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == expected
    assert list(ours.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.type_name == tensor.tensor_type.name
        assert mine.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert mine.data.tobytes() == tensor.data.tobytes()


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    return write_sample(tmp_path / "sample.gguf")


def test_every_type_reads_as_the_reference_reader_does(sample: Path):
    assert_equal_to_the_reference_reader(read_gguf(sample), gguf.GGUFReader(sample))


def test_decoding_equals_the_quantization_reference(sample: Path):
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(sample).tensors}
    for name, tensor in read_gguf(sample).tensors.items():
        expected = gguf.quants.dequantize(reference[name].data, reference[name].tensor_type)
        assert dequantize(tensor).tobytes() == expected.astype(np.float32).tobytes()
        assert dequantize(tensor).shape == tensor.shape


def test_rows_decode_as_the_rows_of_the_whole(sample: Path):
    tensor = read_gguf(sample).tensors["t.Q4_0"]
    part = dequantize(tensor.rows(1, 3))
    assert part.shape == (2, 4, 64)
    assert np.array_equal(part, dequantize(tensor)[1:3])


def test_a_version_2_file_is_read(sample: Path):
    content = bytearray(sample.read_bytes())
    content[4:8] = struct.pack("<I", 2)
    sample.write_bytes(content)
    assert len(read_gguf(sample).tensors) == len(TYPES) + 1


def test_a_file_cut_off_anywhere_is_refused_by_name(sample: Path):
    content = sample.read_bytes()
    for length in [*range(0, 200, 7), len(content) // 2, len(content) - 8]:
        sample.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"sample\.gguf"):
            read_gguf(sample)


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (0, b"GGML", "no GGUF file"),
        (4, struct.pack("<I", 1), "of version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 60), "tensors but only"),
        (16, struct.pack("<Q", 1 << 60), "metadata entries but only"),
        (24, struct.pack("<Q", 1 << 60), "bytes of text but only"),
    ],
)
def test_absurd_headers_are_refused(sample: Path, position: int, value: bytes, reason: str):
    content = bytearray(sample.read_bytes())
    content[position : position + len(value)] = value
    sample.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_gguf(sample)


def tensor_info_position(content: bytes, name: str) -> int:
    key = struct.pack("<Q", len(name)) + name.encode()
    return content.index(key) + len(key)


@pytest.mark.parametrize(
    ("skip", "value", "reason"),
    [
        (0, struct.pack("<I", 9), "9 dimensions"),
        (4, struct.pack("<Q", 8 << 20), "outside of its"),
        (12, struct.pack("<I", 999), "unknown type 999"),
        (16, struct.pack("<Q", 1 << 40), "outside of its"),
        (16, struct.pack("<Q", 1), "not just after"),
    ],
)
def test_absurd_tensors_are_refused(sample: Path, skip: int, value: bytes, reason: str):
    content = bytearray(sample.read_bytes())
    position = tensor_info_position(content, "t.vector") + skip
    content[position : position + len(value)] = value
    sample.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_gguf(sample)


def test_columns_that_are_no_whole_blocks_are_refused(sample: Path):
    content = bytearray(sample.read_bytes())
    position = tensor_info_position(content, "t.Q4_0") + 4
    content[position : position + 8] = struct.pack("<Q", 65)
    sample.write_bytes(content)
    with pytest.raises(CheckpointError, match="65 columns, no multiple of 32"):
        read_gguf(sample)


def test_a_missing_file_and_a_missing_key_are_named(sample: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"absent\.gguf"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match=r"no metadata key 'c\.d'"):
        read_gguf(sample).require("c.d")
