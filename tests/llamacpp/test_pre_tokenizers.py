import json

import pytest
import tokenizers

from qatlora.llamacpp.pre_tokenizers import PRE_TOKENIZERS, name_of


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_rule_is_recognized_after_the_library_wrote_it(name: str):
    whole = {"model": {"type": "BPE", "vocab": {}, "merges": []}}
    whole["pre_tokenizer"] = PRE_TOKENIZERS[name]
    written = json.loads(tokenizers.Tokenizer.from_str(json.dumps(whole)).to_str())
    assert name_of(written["pre_tokenizer"]) == name


def test_trimmed_offsets_do_not_matter_but_a_prefix_space_does():
    rule = dict(PRE_TOKENIZERS["gpt-2"])
    assert name_of(rule | {"trim_offsets": False}) == "gpt-2"
    assert name_of(rule | {"add_prefix_space": True}) is None
    assert name_of(None) is None
