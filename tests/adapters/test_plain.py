"""The deployed model as a plain one in float32, of a checkpoint and of both kinds of build."""

from pathlib import Path

import pytest
import torch
from loaded_cases import adapted_model, built_folder
from torch import nn

from qatlora.adapters.plain import deployed_model
from qatlora.base.others import deployed_other
from qatlora.grid import decode


@pytest.mark.parametrize("kind", ["checkpoint", "q4_0", "nf4"])
def test_every_q4_0_linear_is_plain_and_holds_the_deployed_blocks(
    kind: str, tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    folder = tiny_gemma3_folder
    if kind != "checkpoint":
        folder = tmp_path / kind
        built_folder(tiny_gemma3_folder, folder, kind)
    adapted = adapted_model(folder, storage="nf4" if kind == "nf4" else "q4_0")
    model = deployed_model(adapted, "q8_0", torch.device("cpu"))
    for name, blocks in adapted.deployed():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, decode(blocks, torch.float32)), name
    stored = adapted.base.source.tensor("model.embed_tokens.weight")
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(embeddings, deployed_other(stored, "q8_0"))
    assert model.get_output_embeddings().weight is embeddings
    logits = model(torch.tensor([[2, 5, 9]])).logits
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
