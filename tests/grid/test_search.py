"""The step search against a dense scan, the reference encoder, and llama-quantize --imatrix."""

import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from qatlora.errors import GridError
from qatlora.grid import (
    decode,
    encode_reference,
    latents,
    nearest_levels,
    pack,
    search_steps,
    unpack,
)
from qatlora.grid.types import Q4Blocks
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.llamacpp.tools import find_tool

KINDS = ["gauss", "heavy-tailed", "one-sided"]


def sample(kind: str, rows: int = 96, width: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, width, generator=generator) * 0.02
    if kind == "heavy-tailed":
        weight /= torch.rand(rows, width, generator=generator).clamp_min(1e-2).sqrt()
    return weight.abs() if kind == "one-sided" else weight


def column_importance(width: int = 512) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(4)).square() + 1e-3


def block_errors(
    weight: torch.Tensor, steps: torch.Tensor, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted squared error of each block [rows, in / 32] after nearest levels, in float64."""
    decoded = decode(Q4Blocks(steps, nearest_levels(latents(weight, steps)))).double()
    errors = (decoded - weight.double()).square()
    if importance is not None:
        errors *= importance.double()
    return errors.view(*steps.shape, 32).sum(-1)


def scanned_errors(weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """The least errors over 2 x 250 steps between peak / 3.5 and peak / 20."""
    peaks = weight.view(len(weight), -1, 32).abs().amax(-1)
    least = torch.full(peaks.shape, torch.inf, dtype=torch.float64)
    for divisor in torch.logspace(np.log10(3.5), np.log10(20), 250):
        for sign in (1, -1):
            steps = (sign * peaks / divisor).half()
            least = torch.minimum(least, block_errors(weight, steps, importance))
    return least


@pytest.mark.parametrize("kind", KINDS)
def test_plain_search_is_within_a_thousandth_of_a_dense_scan(kind: str) -> None:
    weight = sample(kind, rows=12)
    ours = block_errors(weight, search_steps(weight)).sum()
    assert ours <= scanned_errors(weight, None).sum() * 1.001


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_search_is_within_a_hundredth_of_a_dense_scan(kind: str) -> None:
    weight, importance = sample(kind, rows=12), column_importance()
    ours = block_errors(weight, search_steps(weight, importance), importance).sum()
    assert ours <= scanned_errors(weight, importance).sum() * 1.01


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_block_is_worse_than_under_the_reference_encoder(kind: str, weighted: bool) -> None:
    weight = sample(kind)
    importance = column_importance() if weighted else None
    ours = block_errors(weight, search_steps(weight, importance), importance)
    blocks = encode_reference(weight)
    theirs = (decode(blocks) - weight).double().square()
    if importance is not None:
        theirs *= importance.double()
    theirs = theirs.view(*blocks.steps.shape, 32).sum(-1)
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < 0.95 * theirs.sum()


def test_one_importance_per_column_equals_one_per_weight() -> None:
    weight, importance = sample("gauss"), column_importance()
    per_weight = importance.expand(weight.shape).contiguous()
    assert torch.equal(search_steps(weight, importance), search_steps(weight, per_weight))


def test_an_important_weight_is_kept_at_the_cost_of_the_peak() -> None:
    weight = torch.full((1, 32), 0.05)
    weight[0, 0] = 1.0
    importance = torch.ones(32)
    importance[0] = 1e-9
    steps = search_steps(weight, importance)
    kept = decode(Q4Blocks(steps, nearest_levels(latents(weight, steps))))
    assert (kept[0, 1:] > 0).all()
    plain = search_steps(weight)
    assert not nearest_levels(latents(weight, plain))[0, 1:].any()


def test_a_block_without_importance_is_searched_without_it() -> None:
    weight = sample("gauss")
    importance = torch.ones(512)
    importance[64:96] = 0
    steps = search_steps(weight, importance)
    assert steps.isfinite().all()
    errors = block_errors(weight, steps)[:, 2].sum()
    assert errors < 0.02 * weight[:, 64:96].double().square().sum()


@pytest.mark.parametrize("scale", [0.0, 1e-42, 3e-8, 1e38])
def test_zero_tiny_and_huge_blocks_get_finite_steps(scale: float) -> None:
    steps = search_steps(sample("gauss", rows=2) * scale)
    assert steps.isfinite().all()
    if scale == 0.0:
        assert not steps.any()


def test_expert_tensors_keep_their_leading_dimensions() -> None:
    weight = sample("gauss").view(3, 32, 512)
    assert torch.equal(search_steps(weight).view(96, 16), search_steps(weight.view(96, 512)))


@pytest.mark.parametrize("importance", [torch.ones(96), -torch.ones(512)])
def test_an_importance_that_does_not_fit_is_refused(importance: torch.Tensor) -> None:
    with pytest.raises(GridError, match="must broadcast"):
        search_steps(sample("gauss"), importance)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_search_beats_llama_quantize_with_an_imatrix_on_its_own_measure(
    kind: str, tmp_path: Path
) -> None:
    weight, importance = sample(kind), column_importance()
    theirs = quantize_with_imatrix(weight, importance, tmp_path)
    # make_qx_quants weighs a weight x by importance * sqrt(mean square of its row + x^2).
    spread = weight.square().mean(-1, keepdim=True)
    measure = importance * (spread + weight.square()).sqrt()
    ours = block_errors(weight, search_steps(weight, measure), measure)
    llama = (decode(theirs).double() - weight.double()).square() * measure.double()
    llama = llama.view(*ours.shape, 32).sum(-1)
    assert (ours <= llama * (1 + 1e-3)).all()
    assert ours.sum() < 0.97 * llama.sum()


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_reference_encoding_equals_llama_quantize_byte_for_byte(kind: str, tmp_path: Path) -> None:
    weight = sample(kind)
    weight[0, :32] = -0.0  # gguf-py's step of such a block differs from llama.cpp's
    assert torch.equal(pack(quantize(weight, tmp_path)), pack(encode_reference(weight)))


@pytest.mark.gpu
def test_cuda_finds_steps_as_good() -> None:
    weight, importance = sample("gauss"), column_importance()
    here = block_errors(weight, search_steps(weight, importance), importance).sum()
    steps = search_steps(weight.cuda(), importance.cuda()).cpu()
    there = block_errors(weight, steps, importance).sum()
    assert abs(float(there / here) - 1) < 1e-4  # sums run in another order


def quantize_with_imatrix(weight: torch.Tensor, importance: torch.Tensor, folder: Path) -> Q4Blocks:
    path = folder / "importance.gguf"
    writer = gguf.GGUFWriter(path, arch="imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["synthetic"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", importance.numpy()[None])
    writer.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), dtype=np.float32))
    finish(writer)
    return quantize(weight, folder, "--imatrix", str(path))


def quantize(weight: torch.Tensor, folder: Path, *options: str) -> Q4Blocks:
    """Run llama-quantize on a file that has this one matrix, and return its blocks."""
    source, target = folder / "f32.gguf", folder / "q4_0.gguf"
    writer = gguf.GGUFWriter(source, arch="llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(weight.shape[1])
    writer.add_feed_forward_length(weight.shape[1])
    writer.add_head_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    writer.add_tensor("blk.0.attn_q.weight", weight.numpy())
    finish(writer)
    tool = find_tool("llama-quantize")
    assert tool
    command = [tool, "--pure", *options, source, target, "Q4_0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    tensor = read_gguf(target).tensors["blk.0.attn_q.weight"]
    assert tensor.type_name == "Q4_0"
    return unpack(torch.from_numpy(np.array(tensor.data)).view(len(weight), -1))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
