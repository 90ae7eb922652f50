"""The three lists at true size, counted on the meta device."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qatlora.base.architectures import matching_weights, tensor_lists
from qatlora.base.names import is_stack, weight_key
from qatlora.base.published import published_config, published_names

ROOT = Path(__file__).parents[2]
# Trained linears; Q4_0 ones in the GGUF. 31B: 50 sliding layers of 7 linears and 10 full ones of 6,
# whose keys are their values; the layers of E4B and E2B that share keys and values have 5.
LINEARS = {
    "gemma4_31b": (410, 410),
    "gemma4_26b_a4b": (205, 205),  # and two stacks of 128 experts in each of 30 layers
    "gemma4_12b": (328, 328),
    "gemma4_e4b": (258, 258 + 2 * 42),
    "gemma4_e2b": (205, 205 + 2 * 35),  # Google's own GGUF has 275 Q4_0 tensors
    "gemma3_27b": (7 * 62, 7 * 62),
    "gemma3_12b": (7 * 48, 7 * 48),
    "gemma3_4b": (7 * 34, 7 * 34),
    "gemma3_1b": (7 * 26, 7 * 26),
    "gemma3_270m": (7 * 18, 7 * 18),
}


def skeleton(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(published_config(name))


def test_every_published_configuration_is_counted():
    assert set(LINEARS) == set(published_names())


@pytest.mark.parametrize("name", LINEARS)
def test_the_lists_hold_the_linears_and_experts_of_the_decoder_and_nothing_else(name: str):
    model = skeleton(name)
    lists = tensor_lists(model.config.model_type)
    trained, q4_0 = (matching_weights(model, one) for one in (lists.trained, lists.q4_0))
    assert (
        tuple(sum(not is_stack(one) for one in names) for names in (trained, q4_0)) == LINEARS[name]
    )
    assert matching_weights(model, lists.nf4) == trained
    decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
    assert all(id(model.get_parameter(weight_key(one))) in decoder for one in trained)


def test_the_experts_of_26b_a4b_are_60_stacks_of_128_along_the_blocks():
    model = skeleton("gemma4_26b_a4b")
    stacks = [
        name for name in matching_weights(model, tensor_lists("gemma4").trained) if is_stack(name)
    ]
    shapes = [tuple(model.get_parameter(name).shape) for name in stacks]
    assert shapes == 30 * [(128, 2 * 704, 2816), (128, 2816, 704)]
    assert sum(map(math.prod, shapes)) == 22_837_985_280


def test_experts_can_be_left_out_by_the_documented_pattern():
    model, pattern = (
        skeleton("gemma4_26b_a4b"),
        "model.language_model.layers.[0-9]+.(self_attn|mlp).*",
    )
    assert pattern in (ROOT / "docs" / "experts.md").read_text(encoding="utf-8")
    trained = matching_weights(model, tensor_lists("gemma4").trained)
    chosen = matching_weights(model, tensor_lists("gemma4", [pattern]).trained)
    assert chosen == [name for name in trained if not is_stack(name)]


def test_the_600_linears_of_the_public_nf4_build_are_410_and_the_vision_tower():
    """Its card says that the tower is in bf16; 190 of its linears are not."""
    model = skeleton("gemma4_31b")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    tower = [name for name in linears if name.startswith("model.vision_tower.")]
    decoder = matching_weights(model, tensor_lists("gemma4").nf4)
    assert (len(decoder), len(tower)) == (410, 190)
    assert len(decoder) + len(tower) == 600


def test_parameters_are_those_of_the_names():
    billions = {"31b": 31.3, "26b_a4b": 25.8, "12b": 12.0, "e4b": 7.9, "e2b": 5.1}
    for name in (name for name in published_names() if name.startswith("gemma4")):
        parameters = sum(parameter.numel() for parameter in skeleton(name).parameters())
        assert parameters / 1e9 == pytest.approx(billions[re.sub("gemma4_", "", name)], abs=0.05)
