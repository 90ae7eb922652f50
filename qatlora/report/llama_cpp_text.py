"""GGUF files in llama.cpp beside the same figures of ours, line by line."""

from collections.abc import Iterator

from qatlora.report.formatting import format_count, format_figure, format_with_error
from qatlora.report.results_fidelity import FidelityModel, FidelityResult, LlamaCppText

CONSOLE_HEADER = ("text", "model", "line", "ours", "llama.cpp")
_SHORT = ("Mean KLD", "Median KLD", "99.0% KLD", "Same top p")
_PERCENT = ("Cor", "Δp", "Same top")


def judged(result: FidelityResult) -> list[FidelityModel]:
    """The models that were run in llama.cpp."""
    return [model for model in result.models if model.llama_cpp]


def line_cells(model: FidelityModel) -> tuple[list[str], list[list[str]]]:
    """Header and a row per line of llama-perplexity, two columns per text."""
    header, rows = ["line"], []
    for text in model.llama_cpp:
        header += [f"{text}, ours", f"{text}, llama.cpp"]
    for lines in zip(*(text.lines for text in model.llama_cpp.values()), strict=True):
        cells = [lines[0].label]
        for line in lines:
            cells.append(_value(line.label, line.ours, line.ours_error))
            cells.append(_value(line.label, line.llama_cpp, line.llama_cpp_error))
        rows.append(cells)
    return header, rows


def short_cells(result: FidelityResult) -> list[list[str]]:
    """Cells below `CONSOLE_HEADER`: a few lines per model and text."""
    return [
        [
            text,
            model.name,
            line.label,
            _value(line.label, line.ours, line.ours_error),
            _value(line.label, line.llama_cpp, line.llama_cpp_error),
        ]
        for model in judged(result)
        for text, figures in model.llama_cpp.items()
        for line in figures.lines
        if line.label in _SHORT
    ]


def caption(result: FidelityResult) -> str:
    """What the two columns are."""
    texts = {name: text for model in judged(result) for name, text in model.llama_cpp.items()}
    return (
        "The lines of llama-perplexity --kl-divergence, and the same figures of ours on the same "
        f"tokens: the second halves of full windows ({', '.join(_sizes(texts))}). Both are against "
        f"the reference above, run here in {result.precision}. What differs is the runtime: "
        "llama.cpp multiplies quantized weights by activations that are rounded to 8 bits."
    )


def _sizes(texts: dict[str, LlamaCppText]) -> Iterator[str]:
    for name, text in texts.items():
        yield f"{name}: {format_count(text.windows)} windows, {format_count(text.tokens)} tokens"


def _value(label: str, value: float, error: float | None) -> str:
    if error is None:
        figure = format_figure(value, decimals=True)
    else:
        figure = format_with_error(value, error)
    return f"{figure} %" if any(part in label for part in _PERCENT) else figure
