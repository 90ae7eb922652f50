"""The words and the page of a comparison, from made-up figures."""

import dataclasses
import io
from html.parser import HTMLParser

from rich.console import Console

from qatlora.report.console import to_console
from qatlora.report.fidelity_plot import distribution_figure, position_figure
from qatlora.report.fidelity_text import (
    advice,
    candidates,
    console_cells,
    headlines,
    statistics_cells,
)
from qatlora.report.html import to_html
from qatlora.report.results import KLD_BIN_EDGES, BaseResult, RunReport
from qatlora.report.results_fidelity import (
    FidelityModel,
    FidelityReference,
    FidelityResult,
    FidelityText,
    KldStatistics,
    PositionMean,
    WorstToken,
)

HOSTILE = "<script>alert('&')</script>"


def text(mean: float, stderr: float = 0.001) -> FidelityText:
    kld = KldStatistics(mean, stderr, mean / 2, *[2 * mean] * 5, 0.0, 0.9, 0.01, 0.02, 0.001)
    histogram = [10] * (len(KLD_BIN_EDGES) - 1)
    positions = [PositionMean(0, 256, 2000, mean, stderr), PositionMean(256, 512, 2048, mean, 0.0)]
    return FidelityText(4048, 21.0, 0.5, 20.0, 0.5, 1.05, 0.01, kld, histogram, positions)


def model(name: str, mean: float, **more) -> FidelityModel:
    worst = WorstToken("wiki", 3, 7, 9.5, f"before {HOSTILE}", "\n", " a", " b", 0.9, 1e-4)
    texts = {"wiki": text(mean, more.pop("stderr", 0.001)), "c4": text(2 * mean)}
    values = {"title": f"tiny → {name}", "given": name, "reference": "bf16", "bytes": 241_000_000}
    return FidelityModel(name=name, texts=texts, worst=[worst], **values | more)


def report(*models: FidelityModel) -> RunReport:
    result = FidelityResult(
        [FidelityReference("bf16", "bf16", 536_000_000, 0.0)], list(models), 512, "bfloat16"
    )
    return RunReport("fidelity", BaseResult("tiny", None, 1000, None, None), fidelity=result)


def test_the_headline_names_the_nearest_first_and_its_size():
    (line,) = headlines(report(model("nf4", 0.2), model("q4_0", 0.1)).fidelity)
    assert line.index("q4_0 0.1500 ± 0.0007 (241 MB)") < line.index("nf4 0.3")
    assert "told apart" not in line


def test_models_within_their_errors_are_called_equal():
    others = model("nf4", 0.101, stderr=0.02), model("q4_0", 0.1, stderr=0.02)
    (line,) = headlines(report(*others, model("q8_0", 0.01)).fidelity)
    assert line.endswith(" q4_0 and nf4 cannot be told apart on so few tokens.")
    assert "q8_0 and" not in line


def test_neither_the_reference_nor_an_untrained_base_can_be_the_nearest():
    before = model("run, before", 0.01)
    after = model("run", 0.3, before="run, before")
    (line,) = headlines(report(model("bf16", 0.0), before, after).fidelity)
    assert line.startswith("Nearest to bf16, by mean KLD over the texts: run 0.45")
    assert headlines(report(model("bf16", 0.0)).fidelity) == []


def test_where_there_is_a_choice_comes_first():
    vanilla = model("vanilla@nf4", 0.3, reference="vanilla@bf16")
    result = report(vanilla, model("q4_0", 0.1), model("nf4", 0.2)).fidelity
    other = FidelityReference("vanilla@bf16", "vanilla@bf16", 536_000_000, 0.0)
    result = dataclasses.replace(result, references=[other, *result.references])
    assert [line.split(",")[0] for line in headlines(result)] == [
        "Nearest to bf16",
        "Nearest to vanilla@bf16",
    ]
    assert advice(vanilla, candidates(result, other)) == ""


def test_a_larger_build_that_is_further_away_is_advised_against():
    small, same = model("small", 0.3, bytes=100), model("same", 0.3001, bytes=150)
    large, best = model("large", 0.4, bytes=300), model("best", 0.1, bytes=200)
    result = report(model("bf16", 0.0), large, small, same, best).fidelity
    ranked = candidates(result, result.references[0])
    assert {each.name: advice(each, ranked) for each in result.models} == {
        "bf16": "",  # the reference itself
        "best": "nearest",
        "small": "50% smaller than best",
        "same": "25% smaller than best",
        "large": "best is nearer and no larger",
    }
    close = report(model("a", 0.1, bytes=200), model("b", 0.1001, bytes=100)).fidelity
    ranked = candidates(close, close.references[0])
    assert advice(ranked[1], ranked) == "50% smaller than a, not told apart from it"
    page = to_html(report(model("bf16", 0.0), large, best), {})
    assert '<tr class="first"><td class="l">best</td>' in page


def test_every_model_has_a_row_for_every_text():
    result = report(model("nf4", 0.2), model("q4_0", 0.1)).fidelity
    wanted = [("wiki", "nf4"), ("wiki", "q4_0"), ("c4", "nf4"), ("c4", "q4_0")]
    assert [tuple(row[:2]) for row in statistics_cells(result)] == wanted
    assert [tuple(row[:2]) for row in console_cells(result)] == wanted


def test_an_exact_model_is_named_beside_the_curves_and_does_not_stretch_them():
    exact = model("q4_0", 0.0)
    for figures in exact.texts.values():
        figures.histogram[:] = [4048] + [0] * (len(KLD_BIN_EDGES) - 2)
    curve = model("nf4", 0.2)
    for figures in curve.texts.values():
        figures.histogram[:5] = [0] * 5
    axis = distribution_figure(report(exact, curve).fidelity, KLD_BIN_EDGES).axes[-1]
    named = [entry.get_text() for entry in axis.get_legend().get_texts()]
    assert named == ["q4_0: 0 everywhere", "nf4"]
    assert axis.get_xlim()[0] == KLD_BIN_EDGES[5]


def test_no_curve_leaves_the_plot_of_positions():
    result = report(model("nf4", 0.2)).fidelity  # c4 twice as high as wiki
    for axis in position_figure(result).axes:
        top = max(line.get_ydata().max() for line in axis.lines)
        assert 0 == axis.get_ylim()[0] < top <= axis.get_ylim()[1]


class Checker(HTMLParser):
    """Collects tags and refuses a page whose tags do not nest."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_foreign_text_stays_text():
    hostile = dataclasses.replace(model("nf4", 0.2), name=HOSTILE, given=HOSTILE)
    page = to_html(report(hostile, model("q4_0", 0.1)), {"kld_distribution.png": b"PNG"})
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "script" not in checker.seen
    assert "&lt;script&gt;" in page
    assert "data:image/png;base64,UE5H" in page


def test_the_table_fits_a_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_console(report(model("q4_0_reference", 0.012345))))
    shown = console.export_text()
    assert "q4_0_reference" in shown
    assert "0.01235 ± 0.001" in shown
    assert "…" not in shown
