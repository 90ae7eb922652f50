"""Hidden states and scores of tiny Hugging Face models on rows of tokens."""

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from qatlora.distill import LmHead
from qatlora.errors import CheckpointError, DataError
from qatlora.evaluate import (
    ScoreSettings,
    evaluate_text,
    final_hidden_states,
    reference_states,
    summarize,
)

EXACT = ScoreSettings(batch_tokens=40, chunk_tokens=7, chunk_words=32, compute_dtype=torch.float32)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 97,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Window:
    input_ids: list[int]
    labels: list[int]


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, final_logit_softcapping=3.0))


def multimodal_gemma() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
    )
    text = Gemma3TextConfig(**SIZES)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=96
        )
    )


@pytest.fixture
def rows() -> list[Window]:
    generator = torch.Generator().manual_seed(7)
    windows = []
    for length in (9, 20, 5, 20, 2):
        ids = torch.randint(0, 90, (length,), generator=generator).tolist()
        labels = list(ids)
        labels[1 : length // 3] = [-100] * len(labels[1 : length // 3])
        windows.append(Window(ids, labels))
    return windows


@pytest.mark.parametrize("make", [llama, gemma, multimodal_gemma])
def test_hidden_states_give_the_models_logits(make):
    model = make().eval()
    tokens = torch.randint(0, 90, (2, 8))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    with torch.no_grad():
        hidden = final_hidden_states(model, tokens, mask)
        wanted = model(input_ids=tokens, attention_mask=mask).logits
    head = LmHead.of(model)
    logits = head.logits(hidden.flatten(0, 1), torch.float32).view_as(wanted)
    torch.testing.assert_close(logits[mask.bool()], wanted[mask.bool()])


def test_hidden_states_of_a_peft_model_contain_its_adapter():
    model = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    tokens = torch.randint(0, 90, (1, 8))
    with torch.no_grad():
        adapted = final_hidden_states(model, tokens)
        with model.disable_adapter():
            base = final_hidden_states(model, tokens)
        wanted = model(tokens).logits[0]
    assert not torch.equal(adapted, base)
    torch.testing.assert_close(LmHead.of(model).logits(adapted[0], torch.float32), wanted)


def test_hidden_states_carry_a_graph_for_training():
    model = llama()
    final_hidden_states(model, torch.ones(1, 3, dtype=torch.int64)).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("make", [llama, gemma])
def test_scores_equal_those_of_each_window_alone(make, rows):
    model = make().eval()
    (scores,) = evaluate_text(model, rows, settings=EXACT)
    wanted = []
    for row in rows:
        with torch.no_grad():
            log_probs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        wanted += [-log_probs[i - 1, w] for i, w in enumerate(row.labels) if i and w != -100]
    torch.testing.assert_close(scores.nll, torch.stack(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [llama, gemma])
def test_divergence_of_a_model_from_itself_is_exactly_zero(make, dtype, rows):
    model = make()
    settings = ScoreSettings(batch_tokens=40, compute_dtype=dtype)
    reference = reference_states(model, rows, settings)
    (scores,) = evaluate_text(model, rows, [reference], settings)
    assert reference.hidden.dtype == dtype
    assert scores.kld.abs().max() == 0
    assert summarize(scores).kld.same_top == 1


def test_divergence_equals_that_of_full_logits(rows):
    model, other = llama(1).eval(), llama(2).eval()
    reference = reference_states(other, rows, EXACT)
    (scores,) = evaluate_text(model, rows, [reference], EXACT)
    first = torch.tensor([rows[0].input_ids])
    with torch.no_grad():
        log_q = model(first).logits[0].double().log_softmax(-1)
        log_p = other(first).logits[0].double().log_softmax(-1)
    kld = (log_p.exp() * (log_p - log_q)).sum(-1)
    at = [i - 1 for i, word in enumerate(rows[0].labels) if i and word != -100]
    torch.testing.assert_close(scores.kld[: len(at)].double(), kld[at], rtol=1e-4, atol=1e-5)


def test_two_references_in_one_pass_give_the_scores_of_two_passes(rows):
    model, others = llama(1), [llama(2), llama(3)]
    references = [reference_states(other, rows, EXACT) for other in others]
    together = evaluate_text(model, rows, references, EXACT)
    for scores, reference in zip(together, references, strict=True):
        (alone,) = evaluate_text(model, rows, [reference], EXACT)
        assert torch.equal(scores.kld, alone.kld)
        assert torch.equal(scores.nll, alone.nll)
        assert torch.equal(scores.same_top, alone.same_top)
        assert torch.equal(scores.reference_nll, alone.reference_nll)
    assert not torch.equal(together[0].kld, together[1].kld)


def test_batching_changes_rounding_only(rows):
    model = llama()
    (together,) = evaluate_text(model, rows, settings=EXACT)
    one_by_one = ScoreSettings(batch_tokens=1, compute_dtype=torch.float32)
    (alone,) = evaluate_text(model, rows, settings=one_by_one)
    torch.testing.assert_close(together.nll, alone.nll, rtol=1e-4, atol=1e-5)


def test_progress_adds_up_to_the_scored_tokens(rows):
    model = llama()
    steps: list[int] = []
    (scores,) = evaluate_text(
        model, rows, settings=EXACT, on_batch=lambda batch: steps.append(len(batch.targets))
    )
    assert sum(steps) == len(scores.nll)
    assert len(steps) > 1


def test_training_mode_is_restored(rows):
    model = llama().train()
    model.model.norm.eval()
    evaluate_text(model, rows, settings=EXACT)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training


def test_reference_of_other_tokens_is_refused(rows):
    model = llama()
    reference = reference_states(model, rows[:2], EXACT)
    with pytest.raises(DataError, match="same rows"):
        evaluate_text(model, rows, [reference], EXACT)
    with pytest.raises(DataError, match="same rows"):
        evaluate_text(model, rows[:1], [reference], EXACT)


def test_rows_without_a_scored_token_are_refused():
    model = llama()
    with pytest.raises(DataError, match="-100 everywhere"):
        evaluate_text(model, [Window([1, 2], [-100, -100])], settings=EXACT)


def test_model_without_an_output_layer_is_refused():
    with pytest.raises(CheckpointError, match="no decoder"):
        final_hidden_states(llama().model, torch.ones(1, 3, dtype=torch.int64))
