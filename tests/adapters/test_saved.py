import dataclasses
import json
from pathlib import Path

import pytest
import torch
from loaded_cases import adapted_model, edit_tensors, edited_folder, loaded
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from qatlora.adapters.attach import AdaptedModel
from qatlora.adapters.saved import load_adapter, read_identity, require_base, save_adapter
from qatlora.errors import AdapterError
from qatlora.files import SUMS

FILES = ("adapter_config.json", "adapter_model.safetensors", "identity.json")


@pytest.fixture(scope="module")
def adapted(tiny_llama_folder: Path) -> AdaptedModel:
    return adapted_model(tiny_llama_folder)


@pytest.fixture
def folder(adapted: AdaptedModel, tmp_path: Path) -> Path:
    """An adapter of one's own to break, without sums: what is found by other means."""
    save_adapter(adapted, tmp_path / "adapter")
    (tmp_path / "adapter" / SUMS).unlink()
    return tmp_path / "adapter"


def edit_identity(folder: Path, **changes: object) -> None:
    path = folder / "identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load_refusal(folder: Path, checkpoint: Path, kind: str = "q4_0") -> str:
    with pytest.raises(AdapterError) as refused:
        load_adapter(loaded(checkpoint, kind), folder)
    return str(refused.value)


@pytest.mark.parametrize("storage", ["nf4", "q4_0", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "steps", "both"])
@pytest.mark.parametrize("rounding", ["frozen", "reference"])
def test_a_loaded_adapter_deploys_what_was_deployed_when_it_was_saved(
    storage: str, kind: str, rounding: str, tiny_llama_folder: Path, tmp_path: Path
):
    first = adapted_model(tiny_llama_folder, storage, kind=kind, rounding=rounding)
    saved = save_adapter(first, tmp_path / "adapter")
    assert saved.deployed == first.deployed_digests()
    again, identity = load_adapter(loaded(tiny_llama_folder, storage), tmp_path / "adapter")
    assert identity == saved
    assert again.rule == first.rule
    assert again.deployed_digests() == saved.deployed
    unmoved = adapted_model(tiny_llama_folder, storage, seed=None, kind=kind, rounding=rounding)
    assert unmoved.deployed_digests() != saved.deployed


def test_the_folder_holds_peft_names_in_float32_and_nothing_else(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_plain_peft_refuses_the_folder(folder: Path):
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "QATLORA"
    with pytest.raises((KeyError, ValueError), match="QATLORA"):
        PeftConfig.from_pretrained(str(folder))


def test_saving_again_replaces_the_whole_folder(adapted: AdaptedModel, folder: Path):
    (folder / "stray.txt").write_text("left over")
    save_adapter(adapted, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, SUMS])
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_lacks_a_file_is_refused(name: str, folder: Path):
    (folder / name).unlink()
    with pytest.raises(AdapterError) as refused:
        read_identity(folder)
    assert f"adapter.path is '{folder}', which has no {name}" in str(refused.value)
    assert "Give the folder 'adapter' of a qatlora run" in str(refused.value)


@pytest.mark.parametrize("damage", ["", '{"grid_version": 1', "[]", "{}", "7", '{"rule": null}'])
def test_a_damaged_identity_file_is_refused(damage: str, folder: Path):
    path = folder / "identity.json"
    path.write_text(damage)
    with pytest.raises(AdapterError) as refused:
        read_identity(folder)
    assert f"{path} is no identity file of qatlora" in str(refused.value)
    assert "use the adapter folder as the run wrote it" in str(refused.value)


@pytest.mark.parametrize("key", ["rule", "trained", "deployed", "unknown"])
def test_an_identity_file_with_a_key_too_few_or_too_many_is_refused(key: str, folder: Path):
    path = folder / "identity.json"
    stored = json.loads(path.read_text())
    if stored.pop(key, None) is None:
        stored[key] = 1
    path.write_text(json.dumps(stored))
    with pytest.raises(AdapterError, match=f"{path} is no identity file"):
        read_identity(folder)


@pytest.mark.parametrize("rule", [{"seed": "x"}, {"rank": "x"}, {"alpha": None}])
def test_a_rule_that_cannot_be_applied_is_refused(
    rule: dict[str, object], folder: Path, tiny_llama_folder: Path
):
    stored = json.loads((folder / "identity.json").read_text())["rule"]
    edit_identity(folder, rule=stored | rule)
    assert f"The rule in {folder / 'identity.json'} cannot be applied" in load_refusal(
        folder, tiny_llama_folder
    )


def test_another_version_of_the_grid_is_refused(folder: Path):
    edit_identity(folder, grid_version=2)
    with pytest.raises(AdapterError) as refused:
        read_identity(folder)
    message = str(refused.value)
    assert f"{folder} was trained with grid version 2 and this qatlora has 1" in message
    assert "Use the qatlora that trained it, or train again." in message


def test_another_base_is_refused_with_both_digests(
    adapted: AdaptedModel, folder: Path, tiny_gemma3_folder: Path
):
    message = load_refusal(folder, tiny_gemma3_folder)
    assert f"The adapter in {folder} was trained on 'tiny'" in message
    assert adapted.base.digest in message
    assert loaded(tiny_gemma3_folder).digest in message
    assert "Set base and storage as in its run." in message


def test_a_base_with_another_norm_is_refused(folder: Path, tiny_llama_folder: Path, tmp_path: Path):
    base = edited_folder(tiny_llama_folder, tmp_path / "base")
    edit_tensors(base, {"model.norm.weight": torch.full((64,), 1.5).bfloat16()})
    message = load_refusal(folder, base)
    assert f"The base in {base} has the steps and levels" in message
    assert loaded(base).digest == loaded(tiny_llama_folder).digest


def test_another_storage_of_the_same_base_is_refused(
    adapted: AdaptedModel, folder: Path, tiny_llama_folder: Path
):
    message = load_refusal(folder, tiny_llama_folder, "bf16")
    assert "as q4_0 with digest" in message
    assert "as bf16 with digest" in message
    assert adapted.base.digest in message


@pytest.mark.parametrize(
    ("trained", "storage", "found"),
    [
        (0, "nf4", "and storage=nf4 has other steps or levels.*Set storage=q4_0"),
        (1, "q4_0", "changes 14 weights of 'tiny', and of the base at hand 13 are trained"),
    ],
)
def test_what_names_and_storage_tell_is_found_before_the_base_is_loaded(
    trained: int, storage: str, found: str, folder: Path
):
    identity = read_identity(folder)
    require_base(identity, folder, identity.trained, "q4_0")
    require_base(identity, folder, identity.trained, "bf16")  # the digest decides
    with pytest.raises(AdapterError, match=found):
        require_base(identity, folder, identity.trained[trained:], storage)


@pytest.mark.parametrize("kept_bytes", [0, 100, -4])
def test_cut_off_parameters_are_refused(kept_bytes: int, folder: Path, tiny_llama_folder: Path):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    message = load_refusal(folder, tiny_llama_folder)
    assert f"{path} cannot be loaded" in message
    assert "use the folder as the run wrote it" in message


def test_parameters_of_another_adapter_are_refused(folder: Path, tiny_llama_folder: Path):
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    name = next(iter(whole))
    save_file({key: tensor for key, tensor in whole.items() if key != name}, path)
    assert f"{path} does not fit its identity file: it lacks" in load_refusal(
        folder, tiny_llama_folder
    )
    save_file(whole | {"base_model.model.x.lora_A.weight": torch.zeros(2)}, path)
    assert "unknown ['base_model.model.x.lora_A" in load_refusal(folder, tiny_llama_folder)
    save_file(whole | {name: torch.zeros(3, 5)}, path)
    assert f"{path} cannot be loaded" in load_refusal(folder, tiny_llama_folder)


def test_other_trained_modules_than_the_adapters_are_refused(folder: Path, tiny_llama_folder: Path):
    base = loaded(tiny_llama_folder, trained=[r"model\.layers\.0\.mlp\.up_proj"])
    with pytest.raises(AdapterError, match="adapter"):
        load_adapter(base, folder)


def test_an_identity_that_changes_the_rule_changes_what_is_deployed(
    adapted: AdaptedModel, folder: Path, tiny_llama_folder: Path
):
    rule = dataclasses.asdict(adapted.rule) | {"seed": 99, "dither": "always"}
    edit_identity(folder, rule=rule)
    again, identity = load_adapter(loaded(tiny_llama_folder), folder)
    assert again.deployed_digests() != identity.deployed  # which the identity gate then counts
