"""Step patches between two GGUF files that gguf-py's writer made, and their refusals."""

import dataclasses
from pathlib import Path

import gguf
import pytest
import torch
from loaded_cases import adapted_model
from safetensors.torch import save_file

from qatlora.adapters.deployed import changed_steps
from qatlora.base.names import weight_key
from qatlora.errors import ExportError, QatloraError
from qatlora.export.patch_head import Beside, read_head
from qatlora.export.step_patch import StepFactors, apply_patch, step_factors, write_patch
from qatlora.files import sha256_of_file
from qatlora.grid import Q4Blocks, encode_reference, pack
from qatlora.llamacpp.convert import TensorPlace

SHAPES = {
    "blk.0.attn_q.weight": (64, 96),
    "blk.0.ffn_down.weight": (32, 160),
    "blk.0.ffn_down_exps.weight": (3, 32, 64),
}
RANK = 3
BESIDE = Beside("# merged\n", ["<|im_end|>"])


def random_blocks(seed: int) -> dict[str, Q4Blocks]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: encode_reference(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }


def random_factors(seed: int) -> dict[str, StepFactors]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    return {
        name: StepFactors(draw(*rows, RANK), draw(*rows[:-1], RANK, columns // 32))
        for name, (*rows, columns) in SHAPES.items()
    }


def moved(blocks: dict[str, Q4Blocks], factors: dict[str, StepFactors]) -> dict[str, Q4Blocks]:
    return {
        name: Q4Blocks(changed_steps(one.steps, factors[name].change()), one.levels)
        for name, one in blocks.items()
    }


def write_gguf(path: Path, blocks: dict[str, Q4Blocks], **stamp: str) -> Path:
    """A file with a norm and a vocabulary besides, and entries of its own before the latter."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in stamp.items():
        writer.add_string(f"qatlora.{key}", value)
    writer.add_token_list([f"token {number}" for number in range(500)])
    writer.add_tensor("output_norm.weight", torch.ones(7).numpy())
    for name, one in blocks.items():
        writer.add_tensor(name, pack(one).numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, exported file and the patch between them."""
    blocks, factors = random_blocks(1), random_factors(2)
    base = write_gguf(tmp_path / "base.gguf", blocks, base="tiny", recipe="chat_sft")
    stamp = {"base": "tiny", "adapter": "steps of rank 3", "recipe": "merge"}
    result = write_gguf(tmp_path / "merged.gguf", moved(blocks, factors), **stamp)
    patch = tmp_path / "merged.patch.safetensors"
    write_patch(base, result, factors, BESIDE, patch)
    return base, result, patch


def test_base_and_patch_make_the_exported_file_byte_for_byte(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, result, patch = files
    head = apply_patch(base, patch, tmp_path / "patched.gguf")
    assert (tmp_path / "patched.gguf").read_bytes() == result.read_bytes()
    assert base.read_bytes() != result.read_bytes()
    assert (head.base_name, head.result_name) == ("base.gguf", "merged.gguf")
    assert (head.card, head.stop_texts()) == (BESIDE.card, BESIDE.stops)


def test_the_patch_holds_no_vocabulary_and_no_levels(files: tuple[Path, Path, Path]) -> None:
    base, _, patch = files
    num_factors = sum(pair.up.numel() + pair.down.numel() for pair in random_factors(2).values())
    assert patch.stat().st_size < 4 * num_factors + 1500
    assert read_head(patch).base_sha256 == sha256_of_file(base)


def test_a_base_of_other_blocks_is_refused_with_both_digests(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, _, patch = files
    other = write_gguf(tmp_path / "other.gguf", random_blocks(9), base="tiny", recipe="chat_sft")
    with pytest.raises(ExportError, match=sha256_of_file(other)) as refused:
        apply_patch(other, patch, tmp_path / "patched.gguf")
    assert sha256_of_file(base) in str(refused.value)
    assert not (tmp_path / "patched.gguf").exists()


def test_no_flipped_bit_and_no_cut_makes_a_file(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, _, patch = files
    content, damaged = patch.read_bytes(), tmp_path / "damaged.safetensors"
    pieces = [content[:length] for length in (0, 7, 100, len(content) // 2, len(content) - 1)]
    for place in range(0, len(content), len(content) // 60):
        flipped = bytearray(content)
        flipped[place] ^= 0x20
        pieces.append(bytes(flipped))
    before = set(tmp_path.iterdir()) | {damaged}
    for piece in pieces:
        damaged.write_bytes(piece)
        try:
            apply_patch(base, damaged, tmp_path / "patched.gguf")
        except QatloraError:
            assert set(tmp_path.iterdir()) == before
        else:  # a bit that only people read, or of a padding space
            (tmp_path / "patched.gguf").unlink()


def test_factors_that_do_not_explain_the_file_make_no_patch(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, result, _ = files
    with pytest.raises(ExportError, match="where .* was exported"):
        write_patch(base, result, random_factors(8), BESIDE, tmp_path / "wrong.patch.safetensors")
    assert not list(tmp_path.glob("*wrong*"))


def test_another_safetensors_file_is_no_patch(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    save_file({"header": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ExportError, match="is no whole step patch"):
        apply_patch(files[0], tmp_path / "other.safetensors", tmp_path / "patched.gguf")


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("format", "qatlora step patch 1", "step patch 1' of grid version"),
        ("stops", '["a", 7]', "no list of texts"),
        ("stops", "[", "in its metadata"),
        ("format", "pt", "no whole step patch"),
        ("result_name", "README.md", "would write to"),
        ("result_name", "../m.gguf", "would write to"),
        ("result_name", "m.gguf\nADAPTER /a", "would write to"),
    ],
)
def test_a_patch_of_somebody_else_is_not_believed(
    key: str, value: str, found: str, files: tuple[Path, Path, Path]
) -> None:
    head = dataclasses.asdict(read_head(files[2])) | {key: value}
    save_file({"header": torch.zeros(3)}, files[2], metadata=head)
    with pytest.raises(ExportError, match=found):
        read_head(files[2])


def test_factors_follow_the_rows_that_the_converter_permuted(tiny_llama_folder: Path) -> None:
    adapted = adapted_model(tiny_llama_folder, kind="steps")
    name = "model.layers.0.self_attn.q_proj"
    rows = dict(adapted.base_blocks())[name].steps.shape[0]
    order = torch.randperm(rows).tolist()
    places = {
        f"{one}.weight": TensorPlace(one, order if one == name else None)
        for one in adapted.base.grid
    }
    factors = dict(step_factors(adapted, places))
    for each, before in adapted.base_blocks():
        taken = torch.tensor(order) if each == name else torch.arange(len(before.steps))
        pair = factors[each]
        steps = changed_steps(before.steps[taken], pair.change())
        assert torch.equal(steps, dict(adapted.deployed())[each].steps[taken])


@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_experts"], indirect=True)
def test_every_expert_has_factors_of_its_own(tiny_multimodal_folder: Path) -> None:
    adapted = adapted_model(tiny_multimodal_folder, kind="steps")
    places = {weight_key(one): TensorPlace(one, None) for one in adapted.base.grid}
    factors, deployed = dict(step_factors(adapted, places)), dict(adapted.deployed())
    for name, before in adapted.base_blocks():
        steps = changed_steps(before.steps, factors[name].change())
        assert torch.equal(steps, deployed[name].steps)
