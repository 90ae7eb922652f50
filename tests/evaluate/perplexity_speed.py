"""Evaluated tokens per second beside llama-perplexity's, on the same bf16 weights and cores.

    python tests/evaluate/perplexity_speed.py gemma3_270m    (or smollm2_135m; OMP_NUM_THREADS=2)
    python tests/evaluate/perplexity_speed.py gemma3_270m 6 2    (6 windows and 2 rounds)

Two tasks: the perplexity of a text, and the KLD from a reference that was run before (its kept
hidden states here, its base file of logits there). Both programs score the second halves of the
same windows and take turns, ours, theirs, ours, theirs; the medians count. Theirs is the time of a
long run minus that of a short one, so that starting, loading and tokenizing are left out; ours
begins with the model in memory. On cores that others use only the CPU seconds mean something, and
they with OMP_NUM_THREADS=1.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from qatlora import registry
from qatlora.base.load import load_plain, load_tokenizer
from qatlora.base.source import read_source
from qatlora.base.unpack import embedded_base
from qatlora.config import EvaluateConfig
from qatlora.data.encode import expected_bos
from qatlora.data.rows import Row
from qatlora.data.text import open_general, windows
from qatlora.data.windows import half_scored_windows
from qatlora.evaluate import ScoreSettings, evaluate_text, reference_states
from qatlora.evaluate.logits import scored_logits
from qatlora.export.plain_gguf import write_plain_gguf
from qatlora.llamacpp.kld_base import KldBase, write_base
from qatlora.llamacpp.perplexity import kl_divergence, perplexity

WINDOW, SHORT = 512, 2


def spent(work: Callable[[], object]) -> np.ndarray:
    """Seconds on the clock, and of all cores in this process and the programs it ran."""
    start = np.array([time.perf_counter(), sum(os.times()[:4])])
    work()
    return np.array([time.perf_counter(), sum(os.times()[:4])]) - start


def report(
    task: str,
    ours: Callable[[], object],
    theirs: Callable[[int], object],
    num_windows: int,
    num_rounds: int,
) -> None:
    """Run both in turns and print tokens of whole windows per second, ours and theirs."""
    own, other = [], []
    for _ in range(num_rounds):
        own.append(num_windows * WINDOW / spent(ours))
        long, short = spent(lambda: theirs(num_windows)), spent(lambda: theirs(SHORT))
        other.append((num_windows - SHORT) * WINDOW / (long - short))
    for kind, a, b in zip(
        ("second", "CPU second"), np.transpose(own), np.transpose(other), strict=True
    ):
        rounds = ", ".join(f"{x:.0f}/{y:.0f}" for x, y in zip(a, b, strict=True))
        here, there = np.median(a), np.median(b)
        print(
            f"{task:<11} tokens per {kind:<11}{here:7.0f} here {there:7.0f} llama.cpp, "
            f"ratio {here / there:.2f} ({rounds})"
        )


def main(name: str, num_windows: int = 10, num_rounds: int = 5) -> None:
    folder = embedded_base(name)
    tokenizer, cpu = load_tokenizer(folder), torch.device("cpu")
    text = "\n\n".join(open_general("wiki", registry.locate).held_out)
    rows = half_scored_windows(
        list(windows([text], tokenizer, WINDOW)), expected_bos(tokenizer), WINDOW, num_windows
    )
    model = load_plain(folder, cpu, torch.bfloat16)
    settings = ScoreSettings(chunk_tokens=EvaluateConfig().tokens_per_chunk)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        gguf, document = place / "bf16.gguf", place / "text.txt"
        write_plain_gguf(read_source(folder, name), True, gguf)  # both embedded bases are tied
        document.write_text(text, encoding="utf-8")
        bases = {
            count: base_file(model, rows[:count], place / f"{count}.kld")
            for count in (SHORT, num_windows)
        }
        reference = reference_states(model, rows, settings)
        threads = ("-t", str(torch.get_num_threads()))
        print(f"{name}, {threads[1]} threads, {num_windows} windows of {WINDOW} tokens")
        report(
            "perplexity",
            lambda: evaluate_text(model, rows, (), settings),
            lambda count: perplexity(gguf, document, WINDOW, count, threads),
            num_windows,
            num_rounds,
        )
        report(
            "KLD",
            lambda: evaluate_text(model, rows, [reference], settings),
            lambda count: kl_divergence(gguf, bases[count], threads),
            num_windows,
            num_rounds,
        )


def base_file(model: torch.nn.Module, rows: list[Row], path: Path) -> KldBase:
    tokens = np.array([row.input_ids for row in rows], dtype=np.int32)
    logits = scored_logits(model, rows)
    return write_base(path, tokens, model.get_output_embeddings().weight.shape[0], logits)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
