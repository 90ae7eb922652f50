import logging
import re
from pathlib import Path

import pytest
import torch
from loaded_cases import (
    NUM_LINEARS,
    RULE,
    built_folder,
    edit_json,
    fill,
    loaded,
    on_grid_folder,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qatlora.adapters.attach import attach
from qatlora.adapters.saved import load_adapter, save_adapter
from qatlora.base import architectures
from qatlora.base.load import LoadedBase, load_plain
from qatlora.base.stores import Q4Store
from qatlora.errors import CheckpointError
from qatlora.files import SUMS
from qatlora.grid import GRID_VERSION, Q4Blocks, decode, digest

UP_PROJ = "model.layers.1.mlp.up_proj"
LAYOUTS = ["tiny_gemma3_folder", "tiny_llama_folder"]
TOKENS = torch.arange(4, 24).unsqueeze(0)


@pytest.fixture(scope="module", params=LAYOUTS)
def source(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["on grid", "latent"])
def pair(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A bf16 checkpoint and its packed build in several files."""
    folder = tmp_path_factory.mktemp("pair")
    checkpoint = source
    if request.param == "on grid":
        checkpoint = folder / "bf16"
        on_grid_folder(source, checkpoint)
    built_folder(checkpoint, folder / "packed", "q4_0", max_shard_gb=5e-5)
    return checkpoint, folder / "packed"


@pytest.fixture
def packed(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A packed build of one's own to break, without sums: what is found by other means."""
    built_folder(tiny_llama_folder, tmp_path / "packed", "q4_0")
    (tmp_path / "packed" / SUMS).unlink()
    return tmp_path / "packed"


def blocks_of(base: LoadedBase) -> dict[str, Q4Blocks]:
    return {name: base.model.get_submodule(name).base_blocks() for name in base.grid}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def refusal(folder: Path, kind: str = "q4_0", **settings: object) -> str:
    with pytest.raises(CheckpointError) as refused:
        loaded(folder, kind, **settings)
    return str(refused.value)


def test_a_packed_build_is_the_base_that_its_source_is(pair: tuple[Path, Path]):
    original, build = (loaded(folder) for folder in pair)
    assert build.digest == original.digest
    assert build.on_grid_share == original.on_grid_share
    assert build.grid == original.grid
    assert build.num_parameters == original.num_parameters
    expected = blocks_of(original)
    for name, blocks in blocks_of(build).items():
        assert type(build.model.get_submodule(name).store) is Q4Store
        assert digest(blocks) == digest(expected[name])
    assert torch.equal(logits(build.model), logits(original.model))


def test_nothing_else_differs_from_the_model_of_the_source(pair: tuple[Path, Path]):
    original, build = (loaded(folder).model for folder in pair)
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(original, kind)())
        found = dict(getattr(build, kind)())
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name])
            assert not tensor.requires_grad
    assert not build.training
    tied = [m.get_input_embeddings().weight is m.lm_head.weight for m in (original, build)]
    assert tied[0] == tied[1]
    assert build.generation_config == original.generation_config
    assert not hasattr(build.config, "quantization_config")


def test_packed_linears_are_never_decoded_while_loading(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    def decodes(*_: object) -> None:
        raise AssertionError("a dense copy was made")

    monkeypatch.setattr("qatlora.base.plain.decode", decodes)
    monkeypatch.setattr("qatlora.base.grids.decode", decodes)
    assert len(loaded(pair[1]).grid) == NUM_LINEARS


def test_an_adapter_moves_between_the_build_and_its_source(pair: tuple[Path, Path], tmp_path: Path):
    adapted = attach(loaded(pair[1]), RULE)
    fill(adapted, seed=1)
    saved = save_adapter(adapted, tmp_path / "adapter")
    moved, _ = load_adapter(loaded(pair[0]), tmp_path / "adapter")
    assert moved.deployed_digests() == saved.deployed
    assert torch.equal(logits(moved.model), logits(adapted.model))


def test_bf16_storage_of_a_build_has_the_same_blocks(pair: tuple[Path, Path]):
    packed, unpacked = loaded(pair[1], "q4_0"), loaded(pair[1], "bf16")
    expected = blocks_of(packed)
    for name, blocks in blocks_of(unpacked).items():
        assert digest(blocks) == digest(expected[name])
        assert unpacked.model.get_submodule(name).store.on_grid


def test_nf4_storage_of_a_build_is_refused(packed: Path):
    message = refusal(packed, "nf4")
    assert "stored as packed Q4_0 and storage=nf4 was asked for" in message
    assert "Use storage=q4_0, or storage=bf16" in message


def test_loaded_plainly_every_weight_is_what_its_block_says(pair: tuple[Path, Path]):
    model = load_plain(pair[1], torch.device("cpu"), torch.float32)
    for name, blocks in blocks_of(loaded(pair[1])).items():
        assert torch.equal(model.get_submodule(name).weight, decode(blocks))
    other = load_file(pair[0] / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, other.float())


def test_loaded_plainly_a_build_of_a_grid_is_the_bf16_teacher(source: Path, tmp_path: Path):
    on_grid_folder(source, tmp_path / "bf16")
    built_folder(tmp_path / "bf16", tmp_path / "packed", "q4_0")
    models = [
        load_plain(tmp_path / name, torch.device("cpu"), torch.bfloat16)
        for name in ("bf16", "packed")
    ]
    assert torch.equal(*(logits(model) for model in models))


def test_plain_transformers_refuses_a_packed_build_and_names_it(
    packed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(packed)
    assert "Unknown quantization type, got qatlora_q4_0" in caplog.text


def only_layer_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten Llama's Q4_0 list, so that base.trained can select something else."""
    pattern = r"model\.layers\.0\..*_proj"
    lists = architectures.TensorLists(trained=pattern, nf4=pattern, q4_0=pattern)
    monkeypatch.setitem(architectures.ARCHITECTURES, "llama", lists)


def test_a_trained_module_that_was_not_packed_is_recovered_from_its_bf16(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    only_layer_0(monkeypatch)
    built_folder(tiny_llama_folder, tmp_path / "packed", "q4_0")
    trained = [r"model\.layers\.\d\.mlp\.up_proj"]
    build = loaded(tmp_path / "packed", trained=trained)
    assert UP_PROJ not in build.source.packed_modules
    assert build.trained == ("model.layers.0.mlp.up_proj", UP_PROJ)
    assert build.digest == loaded(tiny_llama_folder, trained=trained).digest


def test_a_module_that_was_packed_but_is_not_in_the_list_is_refused(
    packed: Path, monkeypatch: pytest.MonkeyPatch
):
    only_layer_0(monkeypatch)
    message = refusal(packed)
    assert "as packed Q4_0, which is not in the Q4_0 list" in message
    assert "Give the same base.trained as for the build" in message


def edit_packed(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors if tensor is None else tensors | {name: tensor}, path)


def test_a_missing_packed_tensor_is_refused(packed: Path):
    edit_packed(packed, f"{UP_PROJ}.weight", None)
    assert f"has no tensor '{UP_PROJ}.weight', which its grid.json lists" in refusal(packed)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(160, 35, dtype=torch.uint8),  # no whole blocks
        torch.zeros(160, 18, dtype=torch.uint8),  # half the blocks
        torch.zeros(160 * 36, dtype=torch.uint8),
        torch.zeros(160, 64, dtype=torch.bfloat16),  # not packed
    ],
    ids=["width", "blocks", "flat", "type"],
)
def test_a_packed_tensor_of_the_wrong_size_is_refused(wrong: torch.Tensor, packed: Path):
    edit_packed(packed, f"{UP_PROJ}.weight", wrong)
    message = refusal(packed)
    assert f"'{UP_PROJ}.weight' in" in message
    assert "must be U8 with 18 value(s) for each of its 320 blocks" in message
    assert "copy the folder again" in message


def test_one_flipped_bit_is_found_by_the_digest(packed: Path):
    name = f"{UP_PROJ}.weight"
    weight = load_file(packed / "model.safetensors")[name]
    weight[3, 5] ^= 1
    edit_packed(packed, name, weight)
    message = refusal(packed)
    assert "a tensor was damaged or edited after the build" in message


def test_a_step_that_is_no_number_is_refused(packed: Path):
    name = f"{UP_PROJ}.weight"
    weight = load_file(packed / "model.safetensors")[name]
    weight[3, :2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
    edit_packed(packed, name, weight)
    assert f"A step of {UP_PROJ}" in refusal(packed)


def test_a_truncated_file_is_refused(packed: Path):
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is no whole safetensors file" in refusal(packed)


def test_an_unknown_grid_version_is_refused(packed: Path):
    edit_json(packed / "grid.json", grid_version=GRID_VERSION + 1)
    message = refusal(packed)
    assert f"built with grid version {GRID_VERSION + 1}" in message
    assert "Build it again from tiny" in message


@pytest.mark.parametrize("text", ["", "[]", '{"grid_version": 1}', '{"blocks": 3}'])
def test_a_damaged_record_is_refused(text: str, packed: Path):
    (packed / "grid.json").write_text(text)
    assert "is no record of a build" in refusal(packed)


def test_a_build_without_its_record_is_refused(packed: Path):
    (packed / "grid.json").unlink()
    assert "has no grid.json" in refusal(packed)


def test_a_record_of_another_kind_of_build_is_refused(packed: Path):
    edit_json(packed / "grid.json", storage="nf4")
    assert "they belong to different builds" in refusal(packed)


def test_a_config_of_another_model_is_refused(packed: Path):
    edit_json(packed / "config.json", intermediate_size=192)
    assert "its config.json calls for" in refusal(packed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "lacks 1 tensors .*'model.norm.weight'"),
        ("unknown", "config.json, which knows model.other.weight not at all"),
        ("shape", r"config.json, which knows model.norm.weight .* another shape than \[32\]"),
    ],
)
def test_other_tensors_that_do_not_fit_are_refused(change: str, words: str, packed: Path):
    path = packed / "model.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    changed = {
        "missing": {},
        "unknown": {"model.norm.weight": norm, "model.other.weight": norm.clone()},
        "shape": {"model.norm.weight": norm[:32].clone()},
    }
    save_file(tensors | changed[change], path)
    assert re.search(words, refusal(packed))
