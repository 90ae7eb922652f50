"""The figures of a teacher cache in the report, made up."""

import json
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator

from qatlora.report.cache_plot import CACHE_PLOT, cache_figure
from qatlora.report.cache_text import cache_rows
from qatlora.report.json_report import load_schema, to_json
from qatlora.report.markdown import to_markdown
from qatlora.report.plots import write_plots
from qatlora.report.results import RunReport
from qatlora.report.results_cache import CachePoint, CacheResult


@pytest.fixture
def cache_report(bare_report: RunReport) -> RunReport:
    points = [
        CachePoint(text, top_k, 0.5, 0.5 - 0.8 / top_k, 1.6 / top_k, 5_000_000 * top_k)
        for text in ("task", "general")
        for top_k in (8, 64, 256)
    ]
    result = CacheResult(
        path="runs/cache", teacher="big", top_k=64, temperature=1.0, divergence="forward_kl",
        rows=120, tokens=20_000, added_rows=120, added_tokens=20_000, seconds=61.0,
        bytes=6_440_000, held_out_bytes=335_000_000, points=points,
    )  # fmt: skip
    return replace(bare_report, recipe="teacher_cache", teacher_cache=result)


def test_the_report_is_valid_and_tells_what_was_written(cache_report: RunReport) -> None:
    Draft202012Validator(load_schema()).validate(json.loads(json.dumps(to_json(cache_report))))
    text = to_markdown(cache_report, [CACHE_PLOT])
    assert "Teacher cache written." in text
    assert "6.44 MB, and 335 MB to score held-out text" in text
    assert f"({CACHE_PLOT})" in text


def test_the_table_gives_the_share_that_is_lost(cache_report: RunReport) -> None:
    rows = cache_rows(cache_report.teacher_cache)
    assert rows[1] == ["task", "64", "0.5000", "0.4875", "2.50 %", "2.50 %", "320 MB"]


def test_the_plot_shows_every_text_and_the_size(cache_report: RunReport, tmp_path) -> None:
    left, right = cache_figure(cache_report.teacher_cache).axes
    lost = [line.get_ydata() for line in left.lines if len(line.get_ydata()) == 3]
    assert [list(one) for one in lost] == [pytest.approx([0.1, 0.0125, 0.003125])] * 2
    assert list(right.lines[0].get_ydata()) == [40, 320, 1280]
    assert write_plots(cache_report, tmp_path) == [CACHE_PLOT]
    assert cache_figure(replace(cache_report.teacher_cache, points=[])) is None
