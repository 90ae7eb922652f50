"""Scores while training in the report, made up."""

import json
import math
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator

from qatlora.report.curve_plot import CURVE_PLOT, curve_figure
from qatlora.report.json_report import load_schema, to_json
from qatlora.report.markdown import to_markdown
from qatlora.report.plots import write_plots
from qatlora.report.results import RunReport
from qatlora.report.results_curve import CurveLevel, CurvePoint
from qatlora.tracking.figures import scalars

STEPS = (*range(0, 5000, 100), 5000)
LEVELS = (": teacher", ": reference")


def figures(text: str, perplexity: float, kld: float | None) -> dict[str, object]:
    return {
        "text": text, "tokens": 1020, "mean_nll": math.log(perplexity), "nll_stderr": 0.08,
        "perplexity": perplexity, "kld_mean": kld, "kld_stderr": kld and 0.05 * kld,
    }  # fmt: skip


@pytest.fixture
def curve_report(run_report: RunReport) -> RunReport:
    points, levels = [], []
    for text, perplexity, kld in (("task", 31.0, 0.31), ("general", 17.0, 0.27)):
        for step in STEPS:
            left = 0.4 + 0.6 * math.exp(-step / 600)
            scores = figures(text, perplexity * (1 + 0.25 * left), kld * left)
            points.append(CurvePoint(step=step, **scores))
        levels.append(CurveLevel(model="teacher", **figures(text, perplexity, None)))
        levels.append(CurveLevel(model="reference", **figures(text, 1.27 * perplexity, 1.1 * kld)))
    train = replace(run_report.train, curve=points)
    return replace(run_report, recipe="qat_distill", train=train, curve_levels=levels)


def test_the_report_is_valid_and_names_the_tokens(curve_report: RunReport) -> None:
    document = json.loads(json.dumps(to_json(curve_report)))
    Draft202012Validator(load_schema()).validate(document)
    assert "curve" not in document["train"]
    text = to_markdown(curve_report, [CURVE_PLOT])
    assert "text: task 1,020, general 1,020. " in text
    assert f"({CURVE_PLOT})" in text


def test_each_panel_has_a_line_per_text_and_the_levels_that_it_knows(
    curve_report: RunReport,
) -> None:
    train, levels = curve_report.train, curve_report.curve_levels
    kld, perplexity = curve_figure(train.curve, levels).axes
    for axis, per_text in ((kld, ("", ": reference")), (perplexity, ("", *LEVELS))):
        expected = [text + end for text in ("task", "general") for end in per_text]
        assert [line.get_label() for line in axis.lines] == expected
    task = [point for point in train.curve if point.text == "task"]
    assert list(kld.lines[0].get_xdata()) == list(STEPS)
    assert list(kld.lines[0].get_ydata()) == [point.kld_mean for point in task]
    assert list(perplexity.lines[0].get_ydata()) == [point.perplexity for point in task]
    assert set(perplexity.lines[1].get_ydata()) == {31.0}


def test_without_a_teacher_there_is_perplexity_alone(curve_report: RunReport) -> None:
    points = [replace(one, kld_mean=None, kld_stderr=None) for one in curve_report.train.curve]
    (axis,) = curve_figure(points, []).axes
    assert axis.get_title().startswith("Perplexity")
    assert curve_figure([], []) is None


def test_the_plot_is_written(curve_report: RunReport, tmp_path) -> None:
    assert CURVE_PLOT in write_plots(curve_report, tmp_path)


def test_trackers_get_a_point_under_its_text(curve_report: RunReport) -> None:
    named = scalars(curve_report.train.curve[0])
    assert named["eval/task/kld_mean"] == curve_report.train.curve[0].kld_mean
    assert set(named) == {
        f"eval/task/{name}" for name in figures("task", 2.0, 0.1) if name != "text"
    }
