"""A checkpoint from somebody else: no code of its folder is run, no file outside of it is read."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from loaded_cases import edited_folder, loaded
from safetensors.torch import load_file, save_file

from qatlora.base.layout import plain_config
from qatlora.base.load import load_plain, load_tokenizer
from qatlora.base.source import read_source
from qatlora.errors import AdapterError, CheckpointError, QatloraError
from qatlora.validation.lora import require_lora

CPU = torch.device("cpu")


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return edited_folder(tiny_llama_folder, tmp_path / "base")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        read_source(folder, "other")
    return str(refused.value)


def index_of(folder: Path, file: str) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_checkpoint_of_pickles_alone_is_refused_and_not_opened(
    name: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    message = refusal(folder)
    assert "Only safetensors are read (a pickle can run code)" in message
    assert "save_pretrained" in message
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_safetensors_is_not_opened(folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    loaded(folder, "bf16")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "pytorch_model.bin", "absent.safetensors", 7]
)
def test_an_index_names_only_safetensors_of_its_folder(
    file: str, folder: Path, tmp_path: Path
) -> None:
    index_of(folder, file)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    message = refusal(folder)
    assert "model.safetensors.index.json" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}', "[" * 100_000])
def test_a_damaged_index_is_refused(text: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "is no index of weights" in refusal(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    save_file({"model.norm.weight": norm + 1}, folder / "old.safetensors")
    message = refusal(folder)
    assert "holds the tensor 'model.norm.weight' twice" in message
    assert "old.safetensors" in message


def test_code_of_a_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    references = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    path.write_text(json.dumps(config | {"auto_map": references}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | own))
    load_plain(folder, CPU, torch.bfloat16)  # the class that transformers has for this model_type
    try:
        load_tokenizer(folder)
    except QatloraError as refused:
        message = str(refused)
    else:
        message = str(folder)
    assert str(folder) in message
    path.write_text(json.dumps(config | {"auto_map": references, "model_type": "evil"}))
    with pytest.raises(CheckpointError, match="calls for code of its own, which is never run"):
        plain_config(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "x"), ("hidden_size", -64), ("num_attention_heads", 0), ("vocab_size", None),
     ("vocab_size", "383"), ("num_hidden_layers", 2.5), ("rms_norm_eps", "x"),
     ("hidden_act", "evil")],
)  # fmt: skip
def test_a_config_that_makes_no_model_is_refused_with_its_path(
    key: str, value: object, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    folder = edited_folder(tiny_llama_folder, tmp_path / "base", **{key: value})
    with pytest.raises(CheckpointError) as refused:
        loaded(folder, "bf16")
    assert str(folder) in str(refused.value)


def test_a_lora_of_pickles_or_with_a_module_to_import_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors.*a pickle can run code"):
        require_lora(folder)
    megatron = {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "evil"}
    (folder / "adapter_config.json").write_text(json.dumps(megatron))
    with pytest.raises(AdapterError, match="megatron_config, for which PEFT imports the module"):
        require_lora(folder)
    assert not (tmp_path / "ran").exists()
