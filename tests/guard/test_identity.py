"""Wrong merges of many kinds are put before the first gate; none may pass."""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from loaded_cases import NUM_LINEARS, adapted_model, candidate_of, copied

from qatlora.adapters.attach import AdaptedModel
from qatlora.config import GuardConfig
from qatlora.errors import ExportError, GuardFailed
from qatlora.export.candidate import Candidate
from qatlora.export.publish import publish
from qatlora.grid import Q4Blocks, decode, digest, encode_reference, pack
from qatlora.guard.identity import identity_gate, stored_rows
from qatlora.guard.judge import permit, verdict
from qatlora.llamacpp.convert import TensorPlace
from qatlora.llamacpp.gguf_read import GgufTensor, read_gguf
from qatlora.report.results import GateResult

pytestmark = pytest.mark.llama_cpp

VALUE = "model.layers.1.self_attn.v_proj"
QUERY = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Merge:
    """A right merge and what was recorded when its training ended."""

    adapted: AdaptedModel
    candidate: Candidate
    recorded: dict[str, str]
    num_blocks: int

    def gate(self, candidate: Candidate | None = None, **settings: int) -> GateResult:
        return identity_gate(
            candidate or self.candidate,
            self.adapted.deployed(),
            self.recorded,
            GuardConfig(**settings),
        )


@pytest.fixture(scope="module", params=["tiny_gemma3_folder", "tiny_llama_folder"])
def merge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merge:
    adapted = adapted_model(request.getfixturevalue(request.param))
    candidate = candidate_of(adapted, tmp_path_factory.mktemp("run"))
    num_blocks = sum(blocks.steps.numel() for _, blocks in adapted.deployed())
    return Merge(adapted, candidate, adapted.deployed_digests(), num_blocks)


def test_a_block_of_one_expert_that_differs_is_found(tmp_path: Path):
    torch.manual_seed(0)
    levels = torch.randint(-8, 8, (3, 4, 64), dtype=torch.int8)
    blocks = Q4Blocks(torch.rand(3, 4, 2).half(), levels)
    stored = pack(blocks).numpy()
    stored[2, 1, 20] ^= 1  # a code of its second block
    name, gguf_name = "model.layers.0.experts.down_proj", "blk.0.ffn_down_exps.weight"
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma4")
    writer.add_tensor(gguf_name, stored, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    candidate = Candidate(
        tmp_path / "x.gguf", tmp_path / "y.gguf", {name: TensorPlace(gguf_name, None)}
    )
    gate = identity_gate(candidate, [(name, blocks)], {name: digest(blocks)}, GuardConfig())
    assert (gate.value, gate.status) == (1, "failed")
    assert "1 of 24 blocks in 1 tensors" in gate.message
    rows = torch.arange(12).roll(1)  # the converter's order, counted through all experts
    moved = Candidate(
        candidate.path, candidate.final_path, {name: TensorPlace(gguf_name, rows.tolist())}
    )
    restored = stored_rows(read_gguf(moved.path), moved.places[name], torch.Size(stored.shape))
    assert torch.equal(restored.flatten(0, 1)[rows], torch.from_numpy(stored).flatten(0, 1))


def tensor_of(candidate: Candidate, name: str) -> GgufTensor:
    return read_gguf(candidate.path).tensors[candidate.places[f"{name}.weight"].gguf_name]


def write_bytes(candidate: Candidate, name: str, packed: np.ndarray) -> None:
    """Put other bytes, in the file's row order, in place of a tensor's."""
    old = tensor_of(candidate, name).data.tobytes()
    content = candidate.path.read_bytes()
    assert content.count(old) == 1
    candidate.path.write_bytes(content.replace(old, packed.tobytes()))


def write_blocks(candidate: Candidate, name: str, blocks: Q4Blocks) -> None:
    rows = pack(blocks).flatten(0, -2)
    order = candidate.places[f"{name}.weight"].row_order
    write_bytes(candidate, name, (rows if order is None else rows[order]).numpy())


def naive_merge(adapted: AdaptedModel, candidate: Candidate) -> None:
    """What merging to bf16 and quantizing again does to the trained weights."""
    for name, blocks in adapted.deployed():
        write_blocks(candidate, name, encode_reference(decode(blocks, torch.bfloat16).float()))


def test_a_right_merge_passes_with_no_differing_block(merge: Merge):
    gate = merge.gate()
    assert (gate.name, gate.status, gate.value, gate.limit) == ("identity", "passed", 0, 0)
    start = f"0 of {merge.num_blocks} blocks in {NUM_LINEARS} tensors"
    assert gate.message.startswith(start)


def test_rows_that_the_converter_permuted_are_compared_in_the_order_of_the_checkpoint(
    merge: Merge,
):
    places = merge.candidate.places
    permuted = {name for name, place in places.items() if place.row_order is not None}
    llama = merge.adapted.base.source.model_type == "llama"
    queries_and_keys = {name for name in places if ".q_proj" in name or ".k_proj" in name}
    assert permuted == (queries_and_keys if llama else set())
    opened = read_gguf(merge.candidate.path)
    for name, blocks in merge.adapted.deployed():
        packed, place = pack(blocks), places[f"{name}.weight"]
        assert torch.equal(stored_rows(opened, place, packed.shape), packed)
        if place.row_order is not None:
            unpermuted = TensorPlace(place.gguf_name, None)
            assert not torch.equal(stored_rows(opened, unpermuted, packed.shape), packed)


@pytest.mark.parametrize("offset", [0, 1, 2, 17, 18, -1])
@pytest.mark.parametrize("name", [VALUE, QUERY])
def test_one_changed_bit_is_one_differing_block(
    name: str, offset: int, merge: Merge, tmp_path: Path
):
    broken = copied(merge.candidate, tmp_path)
    packed = tensor_of(broken, name).data.copy().reshape(-1)
    packed[offset] ^= 1
    write_bytes(broken, name, packed)
    gate = merge.gate(broken)
    assert (gate.status, gate.value) == ("failed", 1)
    assert f"the first is in {name}" in gate.message


def test_two_swapped_rows_differ(merge: Merge, tmp_path: Path):
    broken = copied(merge.candidate, tmp_path)
    packed = tensor_of(broken, QUERY).data.copy()
    packed[[0, 1]] = packed[[1, 0]]
    write_bytes(broken, QUERY, packed)
    assert merge.gate(broken).value == 2 * packed.shape[1] / 18


def test_a_merge_that_was_quantized_again_is_stopped(merge: Merge, tmp_path: Path):
    broken = copied(merge.candidate, tmp_path)
    naive_merge(merge.adapted, broken)
    gate = merge.gate(broken)
    assert gate.status == "failed"
    assert gate.value > merge.num_blocks / 10


def test_the_base_in_place_of_the_trained_model_is_stopped(merge: Merge, tmp_path: Path):
    broken = copied(merge.candidate, tmp_path)
    for name, blocks in merge.adapted.base_blocks():
        write_blocks(broken, name, blocks)
    assert merge.gate(broken).value > merge.num_blocks / 2


def test_another_adapter_than_the_recorded_one_counts_all_blocks_though_the_file_is_equal(
    merge: Merge,
):
    other = adapted_model(merge.adapted.base.source.folder, seed=2)
    gate = identity_gate(
        merge.candidate, merge.adapted.deployed(), other.deployed_digests(), GuardConfig()
    )
    assert (gate.status, gate.value) == ("failed", merge.num_blocks)


def test_one_tensor_without_a_record_counts_with_all_its_blocks(merge: Merge):
    lacking = {name: value for name, value in merge.recorded.items() if name != VALUE}
    gate = identity_gate(merge.candidate, merge.adapted.deployed(), lacking, GuardConfig())
    assert gate.value == dict(merge.adapted.deployed())[VALUE].steps.numel()


def test_the_limit_itself_passes(merge: Merge, tmp_path: Path):
    broken = copied(merge.candidate, tmp_path)
    packed = tensor_of(broken, VALUE).data.copy().reshape(-1)
    packed[0] ^= 1
    write_bytes(broken, VALUE, packed)
    assert merge.gate(broken, identity_max_differing_blocks=1).status == "passed"


def test_a_tensor_that_is_absent_or_of_another_type_is_an_error(merge: Merge):
    opened = read_gguf(merge.candidate.path)
    shape = pack(dict(merge.adapted.deployed())[VALUE]).shape
    for gguf_name, found in (("blk.9.attn_v.weight", "absent"), ("token_embd.weight", "Q8_0")):
        with pytest.raises(ExportError) as refused:
            stored_rows(opened, TensorPlace(gguf_name, None), shape)
        assert f"{gguf_name} of {opened.path} is {found}" in str(refused.value)
        assert "use the pinned llama.cpp source" in str(refused.value)


def test_a_wrong_merge_is_never_published(merge: Merge, tmp_path: Path):
    broken = copied(merge.candidate, tmp_path)
    naive_merge(merge.adapted, broken)
    gate = merge.gate(broken)
    with pytest.raises(GuardFailed) as stopped:
        permit(broken, verdict([gate], None))
    message = str(stopped.value)
    assert message.startswith("Nothing was published. Gate identity: ")
    assert f"{gate.value:.6g} differing blocks where the limit is 0" in message
    assert "export again with recipe=export_gguf" in message
    assert not list(tmp_path.iterdir())


def test_an_override_publishes_a_wrong_merge_and_says_why(merge: Merge, tmp_path: Path):
    broken = copied(merge.candidate, tmp_path)
    naive_merge(merge.adapted, broken)
    judged = verdict([merge.gate(broken)], "a test of the naive merge")
    passed = permit(broken, judged)
    assert not judged.passed
    assert judged.override == passed.override == "a test of the naive merge"
    publish(broken, passed)
    assert broken.final_path.is_file()
