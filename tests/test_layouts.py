"""Every published layout, end to end: load, train, guard, export, run the file.

The trained model, the model read back from the GGUF and what llama.cpp makes of that file must be
one: the first two to the last bit, the third within the noise of its 8-bit activations, and without
these (the same weights as F32) within that of sums in another order.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_cases import settings
from sample_text import sentences
from tiny_layouts import MULTIMODAL

from qatlora import pipeline
from qatlora.base.from_gguf import model_from_gguf
from qatlora.base.layout import plain_config
from qatlora.base.load import load_tokenizer
from qatlora.config import AdapterKind, Storage
from qatlora.llamacpp import tools
from qatlora.llamacpp.kld_base import read_base

WINDOW, WINDOWS = 64, 3  # tokens: twice the sliding window
NOISE_NATS = {"Q4_0": 2.4e-3, "F32": 1e-6}
"""Mean KLD of equal weights, transformers in float32 against llama.cpp."""
CASES = list(product((Storage.nf4, Storage.q4_0), (AdapterKind.lora, AdapterKind.steps)))
RUNS = list(product(MULTIMODAL, CASES))
GUARDED_IN_LLAMA_CPP = (CASES[0], CASES[-1])  # for the others this test's own comparison must do


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("tiny_multimodal_folder", "case"),
    RUNS,
    indirect=["tiny_multimodal_folder"],
    ids=[f"{layout}-{storage.name}-{kind.name}" for layout, (storage, kind) in RUNS],
)
def test_what_was_trained_is_what_llama_cpp_runs(
    case: tuple[Storage, AdapterKind],
    tiny_multimodal_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    cfg = settings(tiny_multimodal_folder, files, tmp_path)
    cfg.storage.kind, cfg.adapter.kind = case
    cfg.train.max_steps, cfg.train.steps_learning_rate = 2, 1e-2
    cfg.guard.llama_cpp = case in GUARDED_IN_LLAMA_CPP
    cfg.evaluate.hold_weights = case[0] is Storage.nf4  # the other one reads back what is packed
    pipeline.run(cfg)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    gates = {gate["name"]: gate for gate in report["guard"]["gates"]}
    assert gates["identity"]["value"] == 0
    assert gates["before_after_kld_mean"]["value"] == 0
    assert gates["effect_changed"]["value"] > 0

    gguf = Path(report["export"]["path"])
    text = " ".join(sentences(60))
    ids = load_tokenizer(tiny_multimodal_folder)(text).input_ids
    assert tools.tokenize(gguf, text) == ids
    model = model_from_gguf(gguf, plain_config(tiny_multimodal_folder), torch.float32)
    wide = tmp_path / "f32.gguf"
    tools.convert_types(gguf, wide, "F32")
    routed, klds = getattr(model.config, "enable_moe_block", False), {}
    for path, kind in ((gguf, "Q4_0"), (wide, "F32")):
        windows = llama_cpp_log_probs(path, text, tmp_path / "logits.bin")
        found = [kld_of_window(model, ids, theirs) for ids, theirs in windows]
        klds[kind] = typical(np.concatenate(found), routed=routed)
    assert {kind: kld for kind, kld in klds.items() if kld >= NOISE_NATS[kind]} == {}


def llama_cpp_log_probs(
    gguf: Path, text: str, logits: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (token ids of a window, log-probabilities [scored, V]) of llama.cpp."""
    document = logits.with_suffix(".txt")
    document.write_text(text, encoding="utf-8")
    options = ["-m", gguf, "-f", document, "-c", WINDOW, "-b", WINDOW, "--chunks", WINDOWS]
    options += ["--kl-divergence-base", logits]
    tools.run_tool("llama-perplexity", [str(option) for option in options], timeout=120)
    base = read_base(logits)
    rows = np.concatenate(list(base.log_probs()))
    yield from zip(base.tokens, np.split(rows, len(base.tokens)), strict=True)


def typical(klds: np.ndarray, *, routed: bool) -> float:
    """Mean; where tokens are routed without the 2 % that differ most.

    A token at the edge between two experts goes to either, as the last bits fall.
    """
    num = int(0.98 * len(klds)) if routed else len(klds)
    return float(np.sort(klds)[:num].mean())


@torch.no_grad()
def kld_of_window(model: torch.nn.Module, window: np.ndarray, theirs: np.ndarray) -> list[float]:
    """KL(ours || theirs) in nats for each scored position of the window's second half."""
    ids = torch.from_numpy(window.astype(np.int64))
    ids[0] = model.config.bos_token_id
    ours = model(ids[None]).logits[0, WINDOW // 2 : -1].double().log_softmax(-1)
    return (ours.exp() * (ours - torch.from_numpy(theirs))).sum(-1).tolist()
