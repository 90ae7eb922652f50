"""The tables of recipe=plan: bytes by part and storage, and what fits which GPU."""

from collections.abc import Iterator

from qatlora.report.escape import table
from qatlora.report.formatting import MISSING, format_bytes
from qatlora.report.results_plan import PlanResult

PARTS = {
    "weights": "codes of the Q4_0 list",
    "steps": "their steps",
    "others": "embeddings, norms, towers (bf16)",
    "adapter": "trained parameters",
    "gradients": "gradients",
    "optimizer": "moments of AdamW",
    "activations": "activations of a micro-batch",
    "blocks": "blocks kept for the backward pass",
    "loss": "chunk of the loss",
    "teacher": "teacher (bf16)",
    "head": "teacher's head, to score by",
    "reading": "largest weight while it is read",
    "workspace": "temporaries of the largest matrix",
    "held": "decoded weights while evaluating",
    "read_back": "model read back from the file",
}
_PEAKS = {
    "load": "peak while loading",
    "train": "peak of a training step",
    "evaluate": "peak of an evaluation",
    "export": "peak of export and guard",
}


def plan_headline(result: PlanResult) -> str:
    """What the recommended commands are for, in one sentence."""
    recommended = result.recommended
    if recommended.peak_bytes is None:
        return f"Nothing fits {recommended.gpu_gb:g} GB with rows of this length."
    peak = format_bytes(int(recommended.peak_bytes))
    return f"For {recommended.gpu_gb:g} GB, with a peak of {peak}:"


def part_cells(result: PlanResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the bytes by part."""
    rows = []
    for labels, values in ((PARTS, "parts"), (_PEAKS, "peaks")):
        for key, label in labels.items():
            sizes = [getattr(one, values)[key] for one in result.storages]
            if any(sizes):
                rows.append([label, *(format_bytes(int(size)) for size in sizes)])
    return ["part", *(one.storage for one in result.storages)], rows


def fit_cells(result: PlanResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the longest rows per GPU."""
    header = ["storage", "adapter", "teacher", *(f"{size:g} GB" for size in result.gpu_gb)]
    rows = [
        [one.storage, one.adapter, one.teacher]
        + [MISSING if length is None else f"{length:,}" for length in one.row_tokens]
        for one in result.fits
    ]
    return header, rows


def plan_tables(result: PlanResult) -> Iterator[str]:
    """Paragraphs of Markdown."""
    if result.recommended.commands:
        yield "\n".join(["```sh", *result.recommended.commands, "```"])
    yield (
        f"The checkpoint has {format_bytes(int(result.bf16_bytes))} in bf16; with every matrix of "
        f"its text part in Q4_0 it would have {format_bytes(int(result.q4_0_bytes))}. Planned for "
        f"{result.micro_batch_tokens:,} tokens per micro-batch. A base is loaded weight by weight, "
        "from whatever folder."
    )
    header, rows = part_cells(result)
    yield table(header, rows, "l" + "r" * len(result.storages))
    yield (
        "The longest row of tokens that fits, one row per micro-batch, with "
        "train.gradient_checkpointing=true, train.keep_blocks=false, evaluate.hold_weights=false:"
    )
    header, rows = fit_cells(result)
    yield table(header, rows, "lll" + "r" * len(result.gpu_gb))
