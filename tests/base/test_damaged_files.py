"""Files that were cut off or lost a bit: an error names the file, or the result is the same."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import damaged
from gguf_cases import write_model
from loaded_cases import adapted_model, built_folder, loaded, on_grid_folder
from safetensors.torch import load_file, save_file

from qatlora.adapters.saved import load_adapter, save_adapter
from qatlora.base.from_gguf import model_from_gguf
from qatlora.base.layout import plain_config
from qatlora.base.load import LoadedBase
from qatlora.base.unpack import unpack_gguf
from qatlora.distill import CacheKey, CacheWriter, LmHead, TeacherCache, TopWords
from qatlora.errors import CheckpointError, QatloraError
from qatlora.files import write_sums
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.train import checkpoints

Load = Callable[[], str]


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of everything that a model computes with."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of_base(base: LoadedBase) -> str:
    return digest(base.model) + base.digest


def header_of(path: Path) -> int:
    """Bytes before the data, where the file has such a part."""
    if path.suffix == ".safetensors":
        return 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size // 2


def outcome(load: Load) -> str | QatloraError:
    try:
        return load()
    except QatloraError as error:
        return error


def require_seen(
    path: Path, load: Load, *, header: int | None = None, data_too: bool = True
) -> int:
    """Load every damaged copy of `path`; how many were refused.

    header: bytes before the data.
    data_too: a digest covers the data; without one only the header can be checked.
    """
    content, wanted, header = path.read_bytes(), load(), header or header_of(path)
    refused = 0
    for what, bad in damaged(content, header):
        path.write_bytes(bad)
        found = outcome(load)
        if isinstance(found, QatloraError):
            refused += 1
            assert str(path.parent) in str(found), f"{what}: {found}"
            assert path.name in str(found), f"{what}: {found}"
        else:
            only_data = len(bad) == len(content) and bad[:header] == content[:header]
            assert found == wanted or (only_data and not data_too), f"{path.name}: {what}"
    path.write_bytes(content)
    assert load() == wanted
    return refused


@pytest.fixture(scope="module")
def build(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed build of a base on its grid."""
    folder = tmp_path_factory.mktemp("build")
    on_grid_folder(tiny_llama_folder, folder / "base")
    built_folder(folder / "base", folder / "q4_0", "q4_0")
    return folder / "q4_0"


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "identity.json", "SHA256SUMS"]
)
def test_a_damaged_adapter_is_refused(name: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    adapted = adapted_model(tiny_llama_folder)
    save_adapter(adapted, tmp_path / "adapter")
    base = loaded(tiny_llama_folder)

    def load() -> str:
        return str(load_adapter(base, tmp_path / "adapter")[0].deployed_digests())

    assert require_seen(tmp_path / "adapter" / name, load)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "grid.json", "tokenizer.json", "SHA256SUMS"]
)
def test_a_damaged_build_is_refused(name: str, build: Path, tmp_path: Path) -> None:
    shutil.copytree(build, tmp_path / "build")
    load = lambda: digest_of_base(loaded(tmp_path / "build"))  # noqa: E731
    assert require_seen(tmp_path / "build" / name, load)


@pytest.mark.parametrize("sums", [True, False])
def test_a_damaged_checkpoint_is_refused_with_sums_and_has_a_whole_header_without(
    sums: bool, tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_gemma3_folder, folder)
    if sums:
        write_sums(folder)

    def load() -> str:
        return digest_of_base(loaded(folder, "bf16"))

    assert require_seen(folder / "model.safetensors", load, data_too=sums)


def test_a_damaged_gguf_is_refused_or_has_the_same_weights(
    tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, "llama", tiny_gemma3_folder / "tokenizer.model")
    unpacked = unpack_gguf(path, tmp_path / "unpacked", None)
    config = plain_config(unpacked)

    def load() -> str:
        return digest(model_from_gguf(path, config, torch.bfloat16))

    data_bytes = sum(tensor.data.nbytes for tensor in read_gguf(path).tensors.values())
    header = path.stat().st_size - data_bytes
    assert require_seen(path, load, header=header, data_too=False)


@pytest.mark.parametrize("pattern", ["index.json", "rows-*", "text-*", "head*"])
def test_a_damaged_teacher_cache_is_refused(pattern: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    key = CacheKey("a" * 64, True, "b" * 64, "c" * 64, 300, temperature=1.0, top_k=5)
    writer = CacheWriter(folder, key, "big", {"seed": 1})
    hidden, words = torch.randn(4, 8).bfloat16(), torch.randint(0, 300, (4, 5)).int()
    writer.add_head(LmHead(torch.randn(300, 8).bfloat16(), None, softcap=30.0))
    writer.add_text("abc", hidden, torch.arange(4))
    writer.add({bytes(16): TopWords(words, words.half(), words[:, 0].half(), 300, 1.0)})
    writer.flush()

    def load() -> str:
        cache = TeacherCache(folder)
        return str([cache.row(bytes(16)), cache.text("abc"), cache.head(torch.device("cpu"))])

    (path,) = folder.glob(pattern)
    assert require_seen(path, load)


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_training_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    written = checkpoints.scratch(tmp_path) / "checkpoint-3"
    written.mkdir(parents=True)
    save_file({"weight": torch.randn(4, 8)}, written / "trainable.safetensors")
    torch.save({"step": torch.randn(4)}, written / "optimizer.pt")
    (written / "trainer_state.json").write_text('{"global_step": 3}')
    checkpoints.keep(tmp_path, 3)

    def load() -> str:
        return str(checkpoints.begin(tmp_path, resume=True))

    assert require_seen(tmp_path / "checkpoints" / "checkpoint-3" / name, load)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]  # transformers alone would draw a random one
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*'model\.norm\.weight'"):
        loaded(folder, "bf16")
