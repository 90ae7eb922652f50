"""Cells of the table of gate 5: the candidate in llama.cpp, for console and Markdown."""

from qatlora.report.formatting import MISSING, format_figure, format_share
from qatlora.report.results_runtime import BASE, CONTROL, RuntimeKld, RuntimeResult, RuntimeRow

_BASE_NOTE = f"; {BASE}: what llama.cpp alone makes of the base"

RUNTIME_HEADER = (
    "model",
    "perplexity",
    "KLD trained",
    "p99",
    "same top",
    "KLD teacher",
)


def runtime_rows(result: RuntimeResult) -> list[list[str]]:
    """Cells in the order of `RUNTIME_HEADER`."""
    return [_cells(row) for row in result.rows]


def runtime_caption(result: RuntimeResult) -> str:
    """What the figures were measured on."""
    return (
        f"llama-perplexity on {result.windows} windows of {result.window_tokens} held-out tokens, "
        f"{result.scored_tokens} of them scored: KL(trained || model) and KL(teacher || model) in "
        "nats per token, both references by transformers in fp32; ± is one standard error. "
        f"{CONTROL}: the trained model merged to bf16 and quantized by llama-quantize, the control"
        f"{_BASE_NOTE if any(row.model == BASE for row in result.rows) else ''}."
    )


def _cells(row: RuntimeRow) -> list[str]:
    trained = row.to_trained
    return [
        row.model,
        f"{format_figure(row.perplexity, decimals=True)} ± {row.perplexity_stderr:.2g}",
        _mean(trained),
        format_figure(trained.p99, decimals=True) if trained else MISSING,
        format_share(trained.same_top) if trained else MISSING,
        _mean(row.to_teacher),
    ]


def _mean(kld: RuntimeKld | None) -> str:
    if kld is None:
        return MISSING
    return f"{format_figure(kld.mean, decimals=True)} ± {kld.stderr:.2g}"
