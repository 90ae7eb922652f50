"""Gate 5 with the real programs: a right file, wrong ones, a model that llama.cpp mistakes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from loaded_cases import adapted_model, candidate_of, copied, on_grid_folder
from safetensors.torch import load_file, save_file

from qatlora.adapters.attach import AdaptedModel
from qatlora.base.load import load_plain
from qatlora.base.others import deploy_others
from qatlora.base.plain import put_weight
from qatlora.config import GuardConfig
from qatlora.data.rows import Row
from qatlora.data.windows import half_scored_windows
from qatlora.errors import ToolError
from qatlora.evaluate.logits import scored_logits
from qatlora.export.candidate import Candidate
from qatlora.grid import decode, encode_reference
from qatlora.guard.gates import llama_cpp_gates
from qatlora.guard.runtime import RuntimeTask, judge_in_llama_cpp
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.report.results_runtime import (
    BASE,
    CANDIDATE,
    CANDIDATE_F32,
    CONTROL,
    TEACHER_FP32,
    TRAINED_FP32,
    RuntimeResult,
)

pytestmark = pytest.mark.llama_cpp

CPU = torch.device("cpu")
LIMITS = GuardConfig()


def rows(bos: int | None) -> list[Row]:
    ids = np.random.default_rng(1).integers(3, 384, 400).tolist()
    return half_scored_windows([Row(ids, ids, "general")], bos, 80, 3)


def judged(
    adapted: AdaptedModel, candidate: Candidate, teacher: Path | None = None, bos: int | None = None
) -> RuntimeResult:
    task = RuntimeTask(adapted, candidate, "q8_0", teacher, rows(bos))
    return judge_in_llama_cpp(task, lambda _: None)


def failed(result: RuntimeResult) -> set[str]:
    return {gate.name for gate in llama_cpp_gates(result, LIMITS) if gate.status == "failed"}


@pytest.fixture(scope="module")
def trained(
    tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AdaptedModel, Candidate]:
    """A base on a grid that llama.cpp's rule does not find, with an adapter that moved levels."""
    folder = tmp_path_factory.mktemp("grid") / "base"
    on_grid_folder(tiny_llama_folder, folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "_proj.weight" in name:  # halve the levels: the largest of a block is 4, not 8
            pairs = weights[name].unflatten(-1, (-1, 32))
            top = pairs.abs().amax(-1, keepdim=True)
            weights[name] = ((pairs / top * 4).round() * top / 4).flatten(-2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    adapted = adapted_model(folder)
    return adapted, candidate_of(adapted, tmp_path_factory.mktemp("run"))


def test_a_right_file_is_the_trained_model_in_llama_cpp_and_the_control_is_not(trained):
    adapted, candidate = trained
    teacher = adapted.base.source.folder
    result = judged(adapted, candidate, teacher)
    found = {row.model: row for row in result.rows}
    assert list(found) == [TEACHER_FP32, TRAINED_FP32, CANDIDATE_F32, CANDIDATE, CONTROL]
    assert (result.windows, result.window_tokens, result.scored_tokens) == (3, 80, 3 * 39)
    assert failed(result) == set()
    assert found[CANDIDATE_F32].to_trained.mean < 1e-5
    assert found[CONTROL].to_trained.mean > 10 * found[CANDIDATE].to_trained.mean
    by_hf, by_llama = found[TRAINED_FP32].to_teacher, found[CANDIDATE].to_teacher
    assert by_hf.mean > 0.01
    assert by_llama.mean == pytest.approx(by_hf.mean, abs=1e-3)
    assert [path.name for path in candidate.path.parent.iterdir() if path.is_dir()] == []


def test_the_base_as_llama_quantize_makes_it_stands_beside_the_file(trained):
    adapted, candidate = trained
    source = adapted.base.source
    task = RuntimeTask(adapted, candidate, "q8_0", source.folder, rows(None), with_base=True)
    found = {row.model: row for row in judge_in_llama_cpp(task, lambda _: None).rows}
    assert len(found) == 1 + task.num_models  # and the teacher's own line
    teacher, quantized = (load_plain(source.folder, CPU, torch.float32) for _ in range(2))
    for name in adapted.base.grid:
        blocks = encode_reference(source.tensor(f"{name}.weight").float())
        put_weight(quantized, name, decode(blocks, torch.float32))
    deploy_others(quantized, adapted.base.grid, "q8_0")
    of_teacher, of_quantized = (
        torch.cat([torch.from_numpy(part) for part in scored_logits(model, rows(None))])
        .double()
        .log_softmax(-1)
        for model in (teacher, quantized)
    )
    expected = (of_teacher.exp() * (of_teacher - of_quantized)).sum(-1).mean().item()
    assert found[BASE].to_trained is None
    assert found[BASE].to_teacher.mean == pytest.approx(expected, rel=0.05)


def test_two_swapped_tensors_fail(trained, tmp_path: Path):
    adapted, candidate = trained
    broken = copied(candidate, tmp_path)
    tensors = read_gguf(broken.path).tensors
    first, second = (tensors[f"blk.{layer}.ffn_up.weight"].data.tobytes() for layer in (0, 1))
    content = broken.path.read_bytes()
    swapped = content.replace(first, b"\0" * len(first)).replace(second, first)
    broken.path.write_bytes(swapped.replace(b"\0" * len(first), second))
    assert {"llama_cpp_weights", "llama_cpp"} <= failed(judged(adapted, broken))


def test_the_file_of_another_adapter_fails(trained, tmp_path: Path):
    adapted, candidate = trained
    other = adapted_model(adapted.base.source.folder, seed=2)
    assert {"llama_cpp_weights", "llama_cpp"} <= failed(judged(other, candidate))


def test_layers_that_llama_cpp_takes_for_others_fail(tiny_gemma3_folder: Path, tmp_path: Path):
    """llama.cpp knows a full layer in every sixth place only; this model has one in the second."""
    adapted = adapted_model(tiny_gemma3_folder)
    result = judged(adapted, candidate_of(adapted, tmp_path), bos=2)
    assert {"llama_cpp_weights", "llama_cpp"} <= failed(result)


def test_a_file_that_llama_cpp_cannot_read_is_an_error_and_leaves_nothing(trained, tmp_path: Path):
    adapted, candidate = trained
    broken = copied(candidate, tmp_path)
    broken.path.write_bytes(broken.path.read_bytes()[:-4096])
    with pytest.raises(ToolError, match="llama-quantize failed"):
        judged(adapted, broken)
    assert not (broken.path.parent / "llama_cpp").exists()
    shutil.rmtree(tmp_path / ".candidate")
