"""Evaluated tokens per second beside llama-perplexity's, on the same bf16 weights and cores.

    python tests/evaluate/perplexity_speed.py gemma3_270m    (or smollm2_135m; OMP_NUM_THREADS=2)

Two tasks: the perplexity of a text, and the KLD from a reference that was run before (its kept
hidden states here, its base file of logits there). Both programs score the second halves of the
same windows and take turns, ours, theirs, ours, theirs; the medians count. Theirs is the time of a
long run minus that of a short one, so that starting, loading and tokenizing are left out; ours
begins with the model in memory.
"""

import statistics
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
from qatlora.data.encode import expected_bos
from qatlora.data.rows import Row
from qatlora.data.text import open_general, windows
from qatlora.data.windows import half_scored_windows
from qatlora.evaluate import evaluate_text, reference_states
from qatlora.evaluate.logits import scored_logits
from qatlora.export.plain_gguf import write_plain_gguf
from qatlora.llamacpp.kld_base import KldBase, write_base
from qatlora.llamacpp.perplexity import kl_divergence, perplexity

WINDOW, SHORT, LONG, ROUNDS = 512, 2, 10, 5


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rates(ours: Callable[[], object], theirs: Callable[[int], object]) -> list[tuple[float, float]]:
    """Tokens of whole windows per second, ours and theirs, round by round."""
    found = []
    for _ in range(ROUNDS):
        own = LONG / seconds(ours)
        other = (LONG - SHORT) / (seconds(lambda: theirs(LONG)) - seconds(lambda: theirs(SHORT)))
        found.append((own * WINDOW, other * WINDOW))
    return found


def report(task: str, found: list[tuple[float, float]]) -> None:
    own, other = (statistics.median(column) for column in zip(*found, strict=True))
    rounds = ", ".join(f"{a:.0f}/{b:.0f}" for a, b in found)
    print(f"{task:<12}{own:8.0f} here, {other:8.0f} llama.cpp, ratio {own / other:.2f} ({rounds})")


def main(name: str) -> None:
    folder = embedded_base(name)
    tokenizer, cpu = load_tokenizer(folder), torch.device("cpu")
    text = "\n\n".join(open_general("wiki", registry.locate).held_out)
    rows = half_scored_windows(
        list(windows([text], tokenizer, WINDOW)), expected_bos(tokenizer), WINDOW, LONG
    )
    model = load_plain(folder, cpu, torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        gguf, document = place / "bf16.gguf", place / "text.txt"
        write_plain_gguf(read_source(folder, name), True, gguf)  # both embedded bases are tied
        document.write_text(text, encoding="utf-8")
        bases = {
            count: base_file(model, rows[:count], place / f"{count}.kld") for count in (SHORT, LONG)
        }
        reference = reference_states(model, rows)
        threads = ("-t", str(torch.get_num_threads()))
        print(f"{name}, {threads[1]} threads, {LONG} windows of {WINDOW} tokens, {ROUNDS} rounds")
        report(
            "perplexity",
            rates(
                lambda: evaluate_text(model, rows),
                lambda count: perplexity(gguf, document, WINDOW, count, threads),
            ),
        )
        report(
            "KLD",
            rates(
                lambda: evaluate_text(model, rows, [reference]),
                lambda count: kl_divergence(gguf, bases[count], threads),
            ),
        )


def base_file(model: torch.nn.Module, rows: list[Row], path: Path) -> KldBase:
    tokens = np.array([row.input_ids for row in rows], dtype=np.int32)
    logits = scored_logits(model, rows)
    return write_base(path, tokens, model.get_output_embeddings().weight.shape[0], logits)


if __name__ == "__main__":
    main(sys.argv[1])
