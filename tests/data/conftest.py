"""Tokenizers of the two tiny checkpoints, and stand-ins for the two data packages."""

import json

import pytest
from data_samples import chitchat_record
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def gemma(tiny_gemma3_folder):
    """Tiny tokenizer that adds BOS, with the shipped Gemma 3 template."""
    return AutoTokenizer.from_pretrained(tiny_gemma3_folder)


@pytest.fixture(scope="session")
def smol(tiny_llama_folder):
    """Tiny tokenizer that adds no BOS, with the shipped ChatML template."""
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture(params=["gemma", "smol"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """A stand-in for `registry.locate`: folders laid out as the two packages, small contents."""
    root = tmp_path_factory.mktemp("packages")
    chitchat = root / "chitchat-dataset" / "chitchat_dataset"
    texts = root / "exllamav3" / "exllamav3" / "conversion" / "standard_cal_data"
    chitchat.mkdir(parents=True)
    texts.mkdir(parents=True)
    records = {f"id{n:03}": chitchat_record(n) for n in range(40)}
    (chitchat / "dataset.json").write_text(json.dumps(records))
    articles = [
        f'<doc id="{n}" url="u" title="Place {n}">\nPlace {n}\n\n'
        + f"Place number {n} lies by a cold river where seven old friends eat supper. " * 6
        + "\n\n</doc>\n"
        for n in range(120)
    ]
    (texts / "wiki.utf8").write_text("".join(articles))
    (texts / "tiny.utf8").write_text("\n<|endoftext|>\n".join(f"A fox {n} ran." for n in range(99)))
    (texts / "code.utf8").write_text("\n\n".join(f"x{n} = {n}" for n in range(100)))
    return lambda name: root / name
