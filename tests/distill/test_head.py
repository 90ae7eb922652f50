"""LmHead against the logits of the models it is taken from."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from qatlora.distill import LmHead
from qatlora.errors import CheckpointError

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 97,
}


def gemma(softcap: float | None) -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(**SIZES, final_logit_softcapping=softcap)
    return Gemma3ForCausalLM(config).eval()


def llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval()


@pytest.mark.parametrize("make", [lambda: gemma(2.0), lambda: gemma(None), llama])
def test_logits_equal_the_models(make):
    model = make()
    tokens = torch.randint(0, 97, (1, 11))
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[0]
        wanted = model(tokens).logits[0]
        logits = LmHead.of(model).logits(hidden, torch.float32)
    torch.testing.assert_close(logits, wanted)


def test_softcap_of_zero_means_none():
    assert LmHead.of(gemma(0.0)).softcap is None
    assert LmHead.of(gemma(30.0)).softcap == 30.0


def test_tied_head_shares_the_embedding():
    model = llama(tie_word_embeddings=True)
    assert LmHead.of(model).weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_head_of_a_peft_model_is_that_of_its_base():
    model = gemma(3.0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    head = LmHead.of(wrapped)
    assert head.softcap == 3.0
    assert head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_head_wrapped_by_an_adapter_is_refused():
    model = llama()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(CheckpointError, match="lm_head"):
        LmHead.of(wrapped)


def test_quantized_head_is_refused():
    model = llama()
    model.lm_head = nn.Linear(64, 97, bias=False)
    model.lm_head.weight = nn.Parameter(torch.zeros(10, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(CheckpointError, match="lm_head"):
        LmHead.of(model)


def test_scaled_logits_are_refused():
    model = llama()
    model.config.logits_scaling = 8.0
    with pytest.raises(CheckpointError, match="logits_scaling=8"):
        LmHead.of(model)


def test_bias_is_added_before_the_softcap():
    head = LmHead(torch.zeros(3, 4), torch.tensor([0.0, 1.0, -50.0]), 2.0)
    logits = head.logits(torch.ones(1, 4), torch.float32)
    wanted = 2 * torch.tanh(torch.tensor([[0.0, 0.5, -25.0]]))
    torch.testing.assert_close(logits, wanted)


def test_bf16_products_keep_their_fp32_sums():
    weight = torch.randn(97, 640).bfloat16()
    hidden = torch.randn(33, 640)
    logits = LmHead(weight).logits(hidden, torch.bfloat16)
    wanted = hidden.bfloat16().double() @ weight.double().T
    assert logits.dtype == torch.float32
    # bf16 results would be off by 0.1 here
    assert (logits.double() - wanted).abs().max() < 1e-3


def test_precision_of_other_products_is_left_alone():
    before = torch.backends.mkldnn.matmul.fp32_precision
    LmHead(torch.ones(3, 4)).logits(torch.ones(1, 4))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_head_set_apart_holds_the_same_words_in_memory_of_its_own():
    whole = torch.randn(10, 8)
    head = LmHead(whole[2:6], bias=torch.ones(4), softcap=3.0)
    apart = head.apart()
    assert torch.equal(apart.weight, head.weight)
    assert (apart.bias is head.bias, apart.softcap) == (True, 3.0)
    assert apart.weight.untyped_storage().nbytes() == 4 * 8 * 4
