"""A made-up run with figures of a realistic size and shape; no model is involved."""

import math
import random
from dataclasses import replace

import pytest

from qatlora.report.results import (
    KLD_BIN_EDGES,
    AdapterResult,
    BaseResult,
    ExportResult,
    GateResult,
    GuardResult,
    KldFigures,
    LayerChange,
    RunReport,
    Sample,
    StageTime,
    TextResult,
    TrainPoint,
    TrainResult,
)

NUM_LAYERS = 18
NUM_STEPS = 60
TENSORS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@pytest.fixture
def run_report() -> RunReport:
    """A chat_sft run that passed."""
    rng = random.Random(7)
    task = _text(rng, 9.812, mean_kld=0.173)
    general = _text(rng, 27.61, mean_kld=0.302)
    return RunReport(
        recipe="chat_sft",
        base=BaseResult("gemma3_270m", "nf4", 268_098_176, 0.0, "b" * 64),
        adapter=AdapterResult("lora", 16, 32.0, "frozen", True, None, 3_796_992, 126),
        train=TrainResult(NUM_STEPS, 15_210, 312.4, 3.61, 2.94, 5_400_000_000, _history(rng)),
        texts={
            "task": {
                "base": _text(rng, 14.903, mean_kld=0.41),
                "trained": task,
                "merged": task,
            },
            "general": {
                "base": _text(rng, 26.24, mean_kld=0.288),
                "trained": general,
                "merged": general,
            },
        },
        guard=GuardResult(True, _gates()),
        export=ExportResult(
            "runs/chat_sft/gemma3_270m-chat.gguf",
            "0123456789abcdef" * 4,
            241_388_544,
            {"Q4_0": 126, "Q8_0": 1, "F32": 109},
        ),
        changes=_changes(rng),
        samples=[
            Sample("What did you do last weekend?", {"base": "I", "merged": "I went hiking."}),
            Sample("Tell me a joke.", {"base": "A joke.\n\nA joke.", "merged": "Knock, knock."}),
        ],
        stages=[StageTime("load_base", 8.2), StageTime("train", 312.4), StageTime("guard", 61.0)],
        peak_rss_bytes=5_900_000_000,
        data_notes={
            "chats": {"name": "chitchat-dataset", "licence": "MIT", "dropped": {"too long": 3}},
            "general": {"name": "wiki", "licence": "CC BY-SA (Wikipedia)"},
        },
        versions={"qatlora": "0.1.0", "torch": "2.13.0", "llama.cpp": "llama-cpp-python 0.3.36"},
        settings={"seed": 0, "train": {"learning_rate": 1e-3}, "data": {"path": None}},
    )


@pytest.fixture
def failed_report(run_report: RunReport) -> RunReport:
    """The same run, stopped by the drift gate: nothing was published."""
    gates = list(run_report.guard.gates)
    gates[3] = GateResult(
        "drift", 0.31, 0.15, "nats", "failed", "KLD grew by 0.31 | lower train.learning_rate"
    )
    return replace(run_report, guard=GuardResult(False, gates), export=None)


@pytest.fixture
def bare_report() -> RunReport:
    """A recipe that only loads a base: every other part is missing."""
    return RunReport(recipe="inspect", base=BaseResult("local", "q4_0", 1000, 1.0, "c" * 64))


def _history(rng: random.Random) -> list[TrainPoint]:
    points = []
    for step in range(1, NUM_STEPS + 1):
        ce = 2.3 + 0.9 * math.exp(-step / 15) + rng.gauss(0, 0.12)
        kl = 0.17 + 0.24 * math.exp(-step / 12) + rng.gauss(0, 0.02)
        general = None if step % 4 == 0 else 0.29 + rng.gauss(0, 0.03)
        loss = ce + kl + 0.5 * (general or 0.0)
        points.append(TrainPoint(step, loss, ce, kl, general, 1e-3 * (1 - step / 61), 5.2))
    return points


def _text(rng: random.Random, perplexity: float, mean_kld: float, tokens: int = 4096) -> TextResult:
    values = sorted(rng.lognormvariate(math.log(mean_kld) - 1.6, 1.8) for _ in range(tokens))
    counts = [0] * (len(KLD_BIN_EDGES) - 1)
    for value in values:
        counts[sum(value >= edge for edge in KLD_BIN_EDGES[1:-1])] += 1
    kld = KldFigures(
        sum(values) / tokens, values[tokens // 2], values[int(0.99 * tokens)], 1 - mean_kld / 2
    )
    return TextResult(tokens, perplexity, math.log(perplexity), 0.021, kld, counts)


def _gates() -> list[GateResult]:
    return [
        GateResult("identity", 0.0, 0.0, "blocks", "passed", "all blocks equal"),
        GateResult("roundtrip", 4.1e-5, 1e-3, "nats", "passed", "equal to the noise floor"),
        GateResult("effect", 9.7, 2.0, "standard errors", "passed", "the held-out loss fell"),
        GateResult("drift", 0.014, 0.15, "nats", "passed", "within the budget"),
        GateResult("llama_cpp", None, None, "nats", "skipped", "llama.cpp's tools are absent"),
    ]


def _changes(rng: random.Random) -> list[LayerChange]:
    return [
        LayerChange(
            f"model.layers.{layer}.{tensor}.weight",
            0.01 + 0.002 * place + 0.008 * layer / NUM_LAYERS + rng.random() * 0.002,
            0.0,
        )
        for layer in range(NUM_LAYERS)
        for place, tensor in enumerate(TENSORS)
    ]
