"""`report.html` of a comparison: one page without any outside resource, to be sent around.

It is read on phones, too, and at night: what is wider than the page scrolls beside it, and colours
follow the reader's setting.

Whatever comes from outside (names, texts) is escaped; plots are inline PNGs; bars are plain CSS.
"""

import base64
import html
from collections.abc import Mapping, Sequence

from qatlora.report.escape import visible
from qatlora.report.fidelity_plot import DISTRIBUTION_PLOT, POSITION_PLOT
from qatlora.report.fidelity_text import (
    CHANGE_HEADER,
    LEGEND,
    STATISTICS_HEADER,
    advice,
    by_choice,
    candidates,
    card_cells,
    change_cells,
    headlines,
    self_klds,
    statistics_cells,
)
from qatlora.report.formatting import format_bytes, format_figure, format_with_error
from qatlora.report.llama_cpp_text import caption, judged, line_cells
from qatlora.report.results import RunReport
from qatlora.report.results_fidelity import (
    FidelityModel,
    FidelityReference,
    FidelityResult,
    WorstToken,
)

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1b1b; --note: #555; --line: #ddd;
  --mark: #ffe9a8; --bar: #0072b2; --best: #009e73; --shade: #ccc; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --text: #e4e4e4; --note: #a8a8a8;
  --line: #3a3d42; --mark: #6b5510; --bar: #56b4e9; --best: #2fc79a; --shade: #555; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 2em auto; max-width: 90em; padding: 0 1.5em; }
h1, p { overflow-wrap: anywhere; } p { max-width: 60em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
td.l, th.l { text-align: left; }
.wide { overflow-x: auto; font-size: .85em; /* a shade at the edge where there is more */
  background: linear-gradient(to left, var(--page) 1em, transparent 2em) local,
    linear-gradient(to left, var(--shade), transparent 1em) scroll; }
.wide td { white-space: nowrap; }
.wide td.words { white-space: pre-wrap; min-width: 24em; max-width: 44em; }
.ranking { font-size: 1em; } tr + tr > th { padding-top: 1.2em; }
.verdict { font-size: 1.1em; font-weight: 600; border-left: 4px solid var(--bar);
  padding-left: .8em; }
.bar { background: var(--bar); height: .8em; min-width: .2em; display: inline-block;
  border-radius: 2px; }
.first .bar { background: var(--best); } .first td { font-weight: 600; }
mark { background: var(--mark); color: inherit; padding: 0 .15em; border-radius: 2px;
  white-space: pre-wrap; }
h3 { font-size: 1em; } .note { color: var(--note); }
img { max-width: max(50em, min(100%, 76em)); display: block; }
summary { cursor: pointer; margin: .4em 0; }
"""
_MAX_BAR_EM = 22.0


def to_html(report: RunReport, plots: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        report: a run with a comparison.
        plots: name -> PNG file of the plots that were drawn.
    """
    result = report.fidelity
    assert result is not None
    title = f"{report.recipe} on {report.base.name}"
    sections = [
        ("", _verdict(result)),
        ("Which build to ship", _ranking(result)),
        ("Median and mean KLD", _table(*card_cells(result), num_left=1)),
        ("Distribution of the KLD per token", _image(plots, DISTRIBUTION_PLOT)),
        ("KLD by position in the window", _image(plots, POSITION_PLOT)),
        ("All statistics", f'<p class="note">{_text(LEGEND)}</p>{_statistics(result)}'),
        ("In llama.cpp", _llama_cpp(result)),
        ("Before and after training", _changes(result)),
        ("Worst tokens, in their context", _worst_of_all(result)),
        ("How it was measured", _how(report, result)),
    ]
    body = [f"<h1>{_text(title)}</h1>"]
    for heading, content in sections:
        if content:
            body += [f"<h2>{heading}</h2>", content] if heading else [content]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _verdict(result: FidelityResult) -> str:
    return "".join(f'<p class="verdict">{_text(line)}</p>' for line in headlines(result))


def _ranking(result: FidelityResult) -> str:
    """A bar per model, nearest first, its length the mean KLD over the texts, and what it means."""
    rows = "".join(_ranked_rows(result, each) for each in by_choice(result))
    return f'<div class="wide ranking"><table>{rows}</table></div>'


def _ranked_rows(result: FidelityResult, reference: FidelityReference) -> str:
    longest = max((model.mean_kld for model in result.models), default=0.0) or 1.0
    ranked = candidates(result, reference)
    rows = [
        f'<tr><th class="l">against {_text(reference.name)}</th><th>size</th>'
        '<th>mean KLD over the texts</th><th></th><th class="l"></th></tr>'
    ]
    for model in result.ranked(reference.name):
        width = _MAX_BAR_EM * model.mean_kld / longest
        mean = format_with_error(model.mean_kld, model.mean_kld_stderr)
        best = ' class="first"' if len(ranked) > 1 and model is ranked[0] else ""
        rows.append(
            f'<tr{best}><td class="l">{_text(model.name)}</td><td>{format_bytes(model.bytes)}</td>'
            f'<td>{mean}</td><td class="l"><span class="bar" style="width:{width:.2f}em"></span>'
            f'</td><td class="l">{_text(advice(model, ranked))}</td></tr>'
        )
    return "".join(rows)


def _statistics(result: FidelityResult) -> str:
    return _table(STATISTICS_HEADER, statistics_cells(result), num_left=2)


def _llama_cpp(result: FidelityResult) -> str:
    models = judged(result)
    note = f'<p class="note">{_text(caption(result))}</p>' if models else ""
    return note + "".join(
        f"<h3>{_text(model.name)}</h3>{_table(*line_cells(model), num_left=1)}" for model in models
    )


def _changes(result: FidelityResult) -> str:
    rows = change_cells(result)
    return _table(CHANGE_HEADER, rows, num_left=2) if rows else ""


def _worst_of_all(result: FidelityResult) -> str:
    """A folding table per model; the first is open."""
    models = [model for model in result.models if model.worst]
    return "".join(_worst(model, number == 0) for number, model in enumerate(models))


def _worst(model: FidelityModel, is_open: bool) -> str:
    names = ("KLD", "text", "context", "P reference", "P model", "reference says", "model says")
    head = "".join(f'<th class="l">{name}</th>' for name in names)
    body = "".join(f"<tr>{_worst_row(each)}</tr>" for each in model.worst)
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary>{_text(model.name)}</summary>"
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div></details>'
    )


def _worst_row(worst: WorstToken) -> str:
    """The token is marked behind what stands before it; line breaks are seen."""
    before, token, *tops = (
        _text(text).replace("\n", "⏎")
        for text in (worst.before, worst.token, worst.reference_top, worst.model_top)
    )
    figures = (worst.kld, worst.reference_probability, worst.probability)
    kld, reference, model = (format_figure(value, decimals=True) for value in figures)
    place = f"{_text(worst.text)} {worst.row}:{worst.position}"
    context = f"{before}<mark>{token}</mark>"
    marked = (f"<mark>{top}</mark>" for top in tops)
    cells = [kld, place, reference, model, *marked]
    cells = [f'<td class="l">{cell}</td>' for cell in cells]
    return "".join([*cells[:2], f'<td class="l words">{context}</td>', *cells[2:]])


def _how(report: RunReport, result: FidelityResult) -> str:
    lines = [f"{label}: {value}" for label, value in self_klds(result)]
    lines.append(
        f"Windows of {result.window_tokens} tokens, each with BOS where the tokenizer has one; "
        f"weights and forwards in {result.precision}, logits and softmax summed in float32."
    )
    for name, notes in report.data_notes.items():
        about = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in notes.items())
        lines.append(f"{name}: {about}")
    lines += [f"{model.name}: given as {model.given}" for model in result.models]
    lines.append(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    return _paragraphs(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int) -> str:
    def kind(column: int) -> str:
        return ' class="l"' if column < num_left else ""

    head = "".join(f"<th{kind(i)}>{_text(name)}</th>" for i, name in enumerate(header))
    lines = [
        "".join(f"<td{kind(i)}>{_text(cell)}</td>" for i, cell in enumerate(row)) for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _image(plots: Mapping[str, bytes], name: str) -> str:
    if name not in plots:
        return ""
    data = base64.b64encode(plots[name]).decode("ascii")
    return f'<div class="wide"><img alt="{name}" src="data:image/png;base64,{data}"></div>'


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{_text(line)}</p>" for line in lines)


def _text(text: str) -> str:
    return html.escape(visible(text))
