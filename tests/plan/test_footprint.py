"""The model of memory against published sizes, against stores, and against what autograd keeps."""

import dataclasses
from pathlib import Path

import pytest
import torch
from loaded_cases import RULE, adapted_model, loaded

from qatlora.adapters.deployed import LatentRule
from qatlora.adapters.latents import attach_latents
from qatlora.adapters.layer import GridAdapter
from qatlora.base.layout import plain_config
from qatlora.base.published import published_config
from qatlora.base.stores import Q4Store, Store
from qatlora.evaluate import final_hidden_states
from qatlora.plan.choose import LEANEST, Allowed, longest_row, recommend, usable_bytes
from qatlora.plan.footprint import Job, footprint
from qatlora.plan.shape import ModelShape, model_shape

# Google's sizes of Gemma 3 in bf16 and in int4, GB. Its int4 counts the text with all matrices in 4
# bits; ours adds half a bit for the steps (27B), and its small models keep more than that.
PUBLISHED_GB = {
    "gemma3_27b": (54, 14.1),
    "gemma3_12b": (24, 6.6),
    "gemma3_4b": (8, 2.6),
    "gemma3_1b": (2, 0.5),
}
LEAN = Job("nf4", **LEANEST)


@pytest.mark.parametrize("name", PUBLISHED_GB)
def test_sizes_come_within_a_fifth_of_the_published_ones(name: str):
    shape = model_shape(published_config(name))
    bf16_gb, int4_gb = PUBLISHED_GB[name]
    assert shape.num_parameters * 2 / 1e9 == pytest.approx(bf16_gb, rel=0.2)
    assert shape.num_text_parameters * 4.5 / 8 / 1e9 == pytest.approx(int4_gb, rel=0.2)


def test_the_nf4_build_of_31b_has_its_published_size():
    """17.8 GB "on GPU" are 2^30 bytes; a vision tower in NF4 would save 0.6 of ours."""
    shape = model_shape(published_config("gemma4_31b"))
    needs = footprint(shape, LEAN)
    assert (needs.base - needs.steps) / 2**30 == pytest.approx(17.8, rel=0.2)


@pytest.mark.parametrize("kind", ["nf4", "q4_0", "bf16"])
def test_a_base_takes_what_its_stores_hold(kind: str, tiny_multimodal_folder: Path):
    base = loaded(tiny_multimodal_folder, kind)
    stores = [module for module in base.model.modules() if isinstance(module, Store)]
    steps = sum(store.steps.nbytes for store in stores)
    held = {
        "nf4": lambda store: store.weight.nbytes if hasattr(store, "weight") else 0,
        "q4_0": lambda store: store.codes.nbytes,
        "bf16": lambda store: store.weight.nbytes,
    }[kind]
    shape = model_shape(plain_config(tiny_multimodal_folder))
    needs = footprint(shape, Job(kind))
    assert needs.steps == steps
    # Scales of NF4 are 0.127 bits per weight on top of its codes.
    assert needs.weights == pytest.approx(sum(map(held, stores)), rel=0.04)
    others = {id(p): p.nbytes for p in base.model.parameters() if p.dtype == torch.bfloat16}
    assert needs.others == pytest.approx(sum(others.values()), rel=0.01)


@pytest.mark.parametrize("kind", ["lora", "steps", "both"])
def test_an_adapter_has_the_counted_parameters(kind: str, tiny_multimodal_folder: Path):
    adapted = adapted_model(tiny_multimodal_folder, kind=kind)
    shape = model_shape(plain_config(tiny_multimodal_folder))
    assert shape.adapter_parameters(kind, RULE.rank, RULE.steps_rank) == adapted.num_trainable


@pytest.mark.parametrize(("latent", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_trained_weights_take_the_place_of_the_bases(
    latent: str, dtype: torch.dtype, tiny_llama_folder: Path
):
    model = attach_latents(loaded(tiny_llama_folder, "bf16"), LatentRule("frozen"), dtype)
    held = sum(weight.nbytes for weight in model.parameter_groups().levels)
    codes = sum(one.codes.nbytes for one in model.model.modules() if isinstance(one, Q4Store))
    needs = footprint(model_shape(plain_config(tiny_llama_folder)), Job("bf16", None, latent))
    assert needs.adapter == needs.gradients == held
    assert needs.attached - needs.steps - needs.others == codes


def test_what_autograd_keeps_is_what_was_counted(tiny_multimodal_folder: Path):
    adapted = adapted_model(tiny_multimodal_folder)
    known = [*adapted.model.parameters(), *adapted.model.buffers()]
    seen = {tensor.untyped_storage()._cdata: tensor for tensor in known}
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor
            kept += storage.nbytes()
        return tensor

    ids = torch.arange(256).reshape(2, 128)
    assert any(isinstance(module, GridAdapter) for module in adapted.model.modules())
    adapted.model.train()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        final_hidden_states(adapted.model, ids, torch.ones_like(ids))
    counted = model_shape(plain_config(tiny_multimodal_folder)).kept
    assert kept == pytest.approx(ids.numel() * counted.total(checkpointing=False), rel=0.15)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return model_shape(published_config("gemma4_12b"))


def test_experts_count_one_by_one_and_only_one_stack_is_read_at_a_time():
    shape = model_shape(published_config("gemma4_26b_a4b"))
    assert len(shape.grid) == len(shape.trained) == 205 + 60 * 128
    lora = shape.adapter_parameters("lora", 16, 16)
    of_experts = 30 * 128 * 16 * (1408 + 2816 + 2816 + 704)
    assert of_experts < lora < 1.05 * of_experts
    packed, nf4 = (footprint(shape, Job(kind, **LEANEST)) for kind in ("q4_0", "nf4"))
    assert packed.weights + packed.steps == shape.num_grid_weights * 4.5 / 8
    assert packed.reading == nf4.reading == 128 * 1408 * 2816 * 3.5
    assert nf4.load < nf4.train


def test_checkpointing_keeps_less_and_a_teacher_in_memory_is_a_second_model(shape: ModelShape):
    lean = footprint(shape, LEAN)
    full = footprint(shape, dataclasses.replace(LEAN, checkpointing=False))
    assert lean.activations < full.activations / 5
    taught = footprint(shape, dataclasses.replace(LEAN, teacher="memory"))
    assert taught.train - lean.train > 2 * shape.num_parameters
    assert taught.export - lean.export == taught.head


def test_a_cached_teacher_leaves_its_head_in_memory_and_one_in_a_model_counts_once(
    shape: ModelShape,
):
    head = 2 * shape.vocab_size * shape.hidden_size
    own, cached = (
        footprint(shape, dataclasses.replace(LEAN, teacher=t)) for t in ("self", "cache")
    )
    assert cached.train - own.train == cached.evaluate - own.evaluate == head
    assert cached.export == own.export
    assert cached.load == own.load


def test_the_moments_lie_beside_scores_only_between_the_steps(shape: ModelShape):
    before = footprint(shape, LEAN)
    between = footprint(shape, dataclasses.replace(LEAN, scores_in_training=True))
    assert between.evaluate == before.evaluate + before.optimizer
    assert between.train == before.train
    finished = dataclasses.replace(LEAN, scores_in_training=True, trains=False)
    assert footprint(shape, finished).evaluate == before.evaluate


def test_a_larger_card_takes_longer_rows_and_the_next_length_does_not_fit(shape: ModelShape):
    lengths = [256 * 2**i for i in range(8)]
    longest = [longest_row(shape, LEAN, size, lengths) or 0 for size in (8, 12, 16, 24, 48)]
    assert longest == sorted(longest)
    assert longest[0] == 0 < longest[1] < longest[-1]
    following = dataclasses.replace(LEAN, tokens=2 * longest[1])
    assert footprint(shape, following).peak > usable_bytes(12)


def test_what_is_recommended_fits_and_a_better_teacher_goes_first(shape: ModelShape):
    for size, teacher in ((12, "none"), (24, "cache"), (80, "memory")):
        job = recommend(shape, LEAN, size, 512, Allowed(("memory", "cache", "none")))
        assert footprint(shape, job).peak <= usable_bytes(size)
        assert job.teacher == teacher
    assert recommend(shape, LEAN, 4, 512, Allowed(("none",))) is None


def test_the_base_is_its_own_teacher_in_q4_0_alone(shape: ModelShape):
    job = recommend(shape, LEAN, 24, 512, Allowed(("self",)))
    assert (job.teacher, job.storage) == ("self", "q4_0")
    assert recommend(shape, LEAN, 24, 512, Allowed(("self",), storages=("nf4",))) is None
