"""llama-perplexity: the perplexity of a GGUF, and its KL divergence from a base file.

The lines of `--kl-divergence` are read here; `qatlora.llamacpp.kld_statistics` computes the same.
"""

import re
from pathlib import Path

from qatlora.errors import ToolError
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.llamacpp.kld_base import KldBase
from qatlora.llamacpp.kld_statistics import MIN_TOKENS, Figure, Statistics
from qatlora.llamacpp.tools import run_until, tail

_TIMEOUT_SECONDS = 7200
_LOGITS_BYTES = 64_000_000
_MAX_SEQUENCES = 200  # llama.cpp itself has room for 256
_ESTIMATE = re.compile(r"Final estimate: PPL = ([0-9.]+) \+/- ([0-9.]+)")
_NUMBER = r"(-?(?:\d+\.\d+|inf|nan))"
_LABEL = r"[^:\n]*(?:PPL|KLD|Δp|top p)[^:\n]*?"
_LINE = re.compile(
    rf"^\s*({_LABEL})\s*:\s*{_NUMBER}\s*%?(?:\s*±\s*{_NUMBER}\s*%?)?\s*$", re.MULTILINE
)
_LAST_LINE = re.compile(r"^Same top p: .*%", re.MULTILINE)


def perplexity(
    gguf: Path, text: Path, window: int, max_windows: int, options: tuple[str, ...] = ()
) -> tuple[float, float]:
    """Perplexity and its standard error on a text file.

    Of each window of `window` tokens the second half is scored; `options` are further flags.

    Raises:
        ToolError: the program is missing or failed, or the text is too short.
    """
    files = ["-m", str(gguf), "-f", str(text)]
    arguments = [*files, "-c", str(window), "--chunks", str(max_windows), *options]
    output = run_until("llama-perplexity", arguments, _TIMEOUT_SECONDS, _ESTIMATE)
    match = _ESTIMATE.search(output)
    if match is None:
        raise ToolError(
            f"llama-perplexity gave no estimate for {text}: it needs at least two windows of "
            f"{window} tokens. It ended with: {tail(output)}"
        )
    return float(match[1]), float(match[2])


def kl_divergence(gguf: Path, base: KldBase, options: tuple[str, ...] = ()) -> Statistics:
    """Run a GGUF on the tokens of a base file and read all that the program prints.

    As many windows are run at a time as the program's buffer of logits stays small for.

    Args:
        gguf: the model.
        base: what it is compared with, of the same vocabulary.
        options: further flags; the same for all models that are to be compared.

    Raises:
        ToolError: the program is missing or failed, or the two cannot be compared.
    """
    _require_comparable(gguf, base)
    window = base.tokens.shape[1]
    files = ["-m", str(gguf), "--kl-divergence-base", str(base.path), "--kl-divergence"]
    batch = window * _windows_at_once(window, base.vocab_size)
    sizes = ["-c", str(window), "-b", str(batch), "-ub", str(window)]
    arguments = [*files, *sizes, *options]
    output = run_until("llama-perplexity", arguments, _TIMEOUT_SECONDS, _LAST_LINE)
    if _LAST_LINE.search(output) is None:
        raise ToolError(f"llama-perplexity ended without statistics for {gguf}: {tail(output)}")
    return printed_statistics(output)


def _windows_at_once(window: int, vocab_size: int) -> int:
    """At least one; for a small vocabulary many, which also gives the log time (`run_until`).

    The program makes room for all of them and takes a while to give it back at exit.
    """
    return max(1, min(_MAX_SEQUENCES, _LOGITS_BYTES // (4 * vocab_size * window)))


def printed_statistics(output: str) -> Statistics:
    """The lines of the final statistics, by their labels."""
    return {
        " ".join(label.split()): Figure(float(value), float(error) if error else None)
        for label, value, error in _LINE.findall(output)
    }


def _require_comparable(gguf: Path, base: KldBase) -> None:
    """What the program would only log, or keep silent about."""
    num_words = len(read_gguf(gguf).require("tokenizer.ggml.tokens"))
    if num_words != base.vocab_size:
        raise ToolError(
            f"{gguf} has {num_words} words and {base.path} {base.vocab_size}: compare models of "
            "one vocabulary, padding included."
        )
    if len(base.targets) < MIN_TOKENS:
        raise ToolError(
            f"{base.path} has {len(base.targets)} scored tokens and llama-perplexity gives no "
            f"statistics below {MIN_TOKENS}: write it with more windows."
        )
