"""GGUF files in llama.cpp itself, beside the same figures of ours, line by line.

The reference's kept states become a base file (`qatlora.llamacpp.kld_base`), so both columns are
compared with one and the same reference. llama-perplexity scores the second half of full windows;
our column is taken from the same tokens. A base file has two bytes per word and scored token: one
text is written, run by every file and removed before the next.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatlora.data.rows import IGNORED, Text
from qatlora.errors import FidelityError
from qatlora.evaluate import ReferenceStates, TokenScores
from qatlora.fidelity.figures import scored_places
from qatlora.fidelity.plan import GgufModel
from qatlora.llamacpp.kld_base import KldBase, first_scored, write_base
from qatlora.llamacpp.kld_statistics import MIN_TOKENS, PairScores, statistics_of
from qatlora.llamacpp.perplexity import kl_divergence
from qatlora.llamacpp.tools import require_tool
from qatlora.report.results_fidelity import LlamaCppLine, LlamaCppText

_SCRATCH = ".llama_cpp-"  # as `qatlora.run_folder` knows it, which removes what a killed run left
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class HalfScored:
    """What llama-perplexity can score of a text.

    Attributes:
        text: its name.
        tokens: int32 [N, n_ctx], full windows.
        places: int64 [R], the tokens of their second halves among the text's scored tokens.
    """

    text: str
    tokens: NDArray[np.int32]
    places: Tensor


@dataclass(frozen=True)
class JudgedFile:
    """A GGUF and what was measured of it here, by text."""

    name: str
    path: Path
    scores: Mapping[str, TokenScores]


def half_scored(text: Text, window_tokens: int, max_tokens: int) -> HalfScored | None:
    """The first full windows of a text, scored throughout their second half.

    Args:
        text: its rows, each with BOS in front where the vocabulary asks for one.
        window_tokens: length of a full window.
        max_tokens: scored tokens at most.

    Returns:
        None if these are too few for llama-perplexity, as of conversations.
    """
    first = first_scored(window_tokens)
    full = [
        number
        for number, row in enumerate(text.rows)
        if len(row.input_ids) == window_tokens and IGNORED not in row.labels[first:]
    ]
    taken = full[: max_tokens // (window_tokens - first)]
    if len(taken) * (window_tokens - first) < MIN_TOKENS:
        return None
    rows, positions = scored_places(text.rows).T
    chosen = torch.isin(rows, torch.tensor(taken)) & (positions >= first)
    tokens = np.array([text.rows[number].input_ids for number in taken], dtype=np.int32)
    return HalfScored(text.name, tokens, chosen.nonzero().squeeze(1))


def require_judgeable(
    files: Sequence[GgufModel], parts: Sequence[HalfScored], bos: int | None
) -> None:
    """Check that llama-perplexity can score these files.

    Args:
        files: of the comparison.
        parts: what can be scored of its texts.
        bos: what the windows begin with; None for none.

    Raises:
        ToolError: the program is not there.
        FidelityError: there is nothing for it to do, or it would see other tokens.
    """
    require_tool("llama-perplexity")
    if not files:
        raise FidelityError(
            "fidelity.llama_cpp=true and no GGUF file among fidelity.models: llama.cpp runs "
            "nothing else. Add FILE.gguf, or leave the setting out."
        )
    if not parts:
        raise FidelityError(
            "fidelity.llama_cpp=true and no text that fills enough windows: llama-perplexity "
            f"scores the second half of full windows and needs {MIN_TOKENS} tokens. Add wiki to "
            "fidelity.texts, raise fidelity.tokens_per_text and fidelity.llama_cpp_tokens, or set "
            "fidelity.window_tokens lower."
        )
    for file in files:
        if file.bos not in (None, bos):
            raise FidelityError(
                f"llama.cpp would begin every window of {file.path} with token {file.bos}, and the "
                f"base's tokenizer begins it with {'none' if bos is None else bos}: the figures "
                "would be of other tokens. Correct tokenizer.ggml.add_bos_token in the file, or "
                "set fidelity.llama_cpp=false."
            )


def judge(
    parts: Sequence[HalfScored],
    reference: Mapping[str, ReferenceStates],
    compute_dtype: torch.dtype,
    files: Sequence[JudgedFile],
    folder: Path,
    on_run: Callable[[int], None],
) -> dict[str, dict[str, LlamaCppText]]:
    """Run every file on every text.

    Args:
        parts: what is scored.
        reference: its states by text.
        compute_dtype: in which `files` were scored against it.
        files: with their scores here.
        folder: for the base files, which are removed.
        on_run: called with 1 after each run.

    Returns:
        Name of the file -> name of the text -> the lines.

    Raises:
        ToolError: llama-perplexity is missing or failed on a file.
    """
    found: dict[str, dict[str, LlamaCppText]] = {file.name: {} for file in files}
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
        for part in parts:
            path = Path(scratch) / "reference.kld"
            base = _write_reference(part, reference[part.text], compute_dtype, path)
            for file in files:
                found[file.name][part.text] = _judged(base, part, file)
                on_run(1)
    return found


def _write_reference(
    part: HalfScored, states: ReferenceStates, compute_dtype: torch.dtype, path: Path
) -> KldBase:
    def logits() -> Iterator[NDArray[np.float32]]:
        for hidden in states.hidden[part.places].split(_ROWS_AT_ONCE):
            on_device = hidden.to(states.head.weight.device)
            yield states.head.logits(on_device, compute_dtype).cpu().numpy()

    return write_base(path, part.tokens, states.head.vocab_size, logits())


def _judged(base: KldBase, part: HalfScored, file: JudgedFile) -> LlamaCppText:
    printed = kl_divergence(file.path, base)
    ours = statistics_of(_pairs(file.scores[part.text], part.places))
    lines = [
        LlamaCppLine(label, line.value, line.error, printed[label].value, printed[label].error)
        for label, line in ours.items()
    ]
    return LlamaCppText(len(part.tokens), len(part.places), lines)


def _pairs(scores: TokenScores, places: Tensor) -> PairScores:
    columns = (scores.nll, scores.reference_nll, scores.kld, scores.same_top)
    chosen = []
    for column in columns:
        assert column is not None, "scores against a reference have every column"
        chosen.append(column[places].numpy())
    return PairScores(*chosen)
