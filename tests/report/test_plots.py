from dataclasses import replace

import matplotlib as mpl
import pytest
from matplotlib.image import imread

from qatlora.report.axes import DOTS_PER_INCH, PANEL_INCHES
from qatlora.report.changes import changes_by_kind
from qatlora.report.plots import (
    CHANGES_PLOT,
    KLD_PLOT,
    LOSS_PLOT,
    changes_figure,
    kld_figure,
    loss_figure,
    write_plots,
)
from qatlora.report.results import KLD_BIN_EDGES


def test_the_plots_are_images_of_the_expected_size_with_something_on_them(run_report, tmp_path):
    names = write_plots(run_report, tmp_path)
    assert names == [LOSS_PLOT, KLD_PLOT, CHANGES_PLOT]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    width, height = (inches * DOTS_PER_INCH for inches in PANEL_INCHES)
    for name, panels in ((LOSS_PLOT, 2), (KLD_PLOT, 2), (CHANGES_PLOT, 1.4)):
        image = imread(tmp_path / name)
        assert image.shape[:2] == pytest.approx((height, panels * width), abs=1)
        assert image[..., :3].std() > 0.05


def test_plots_without_figures_are_not_written_and_old_ones_are_removed(bare_report, tmp_path):
    (tmp_path / LOSS_PLOT).write_bytes(b"of an earlier run")
    assert write_plots(bare_report, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_nothing_global_of_matplotlib_is_changed(run_report, tmp_path):
    before = dict(mpl.rcParams)
    write_plots(run_report, tmp_path)
    assert dict(mpl.rcParams) == before


def test_every_panel_has_a_title_and_labelled_axes(run_report):
    figures = [
        loss_figure(run_report.train.history),
        kld_figure(run_report.texts),
        changes_figure(changes_by_kind(run_report.changes)),
    ]
    for figure in figures:
        for axis in figure.axes:
            assert axis.get_title()
            assert axis.get_xlabel()
            assert axis.get_ylabel()


def test_the_loss_of_a_run_without_a_teacher_is_one_panel(run_report):
    history = [replace(point, kl=None, general_kl=None) for point in run_report.train.history]
    assert len(loss_figure(history).axes) == 1
    assert loss_figure(history[:1]) is not None
    assert loss_figure([]) is None


def test_steps_are_shown_where_the_adapter_changed_them(run_report):
    changes = run_report.changes
    both = [replace(change, steps_changed=0.4) for change in changes]
    only_steps = [replace(change, levels_changed=0.0) for change in both]
    nothing = [replace(change, levels_changed=0.0) for change in changes]

    def titles(some):
        return [axis.get_title() for axis in changes_figure(changes_by_kind(some)).axes]

    assert titles(changes) == ["Codes changed, by layer"]
    assert titles(both) == ["Codes changed, by layer", "Steps changed, by layer"]
    assert titles(only_steps) == ["Steps changed, by layer"]
    assert titles(nothing) == ["Codes changed, by layer"]


def test_the_histogram_shows_the_shares_of_all_tokens_in_the_right_bins(run_report):
    counts = [0] * (len(KLD_BIN_EDGES) - 1)
    counts[0], counts[10] = 1, 3
    result = replace(run_report.texts["task"]["base"], kld_histogram=counts)
    (axis,) = kld_figure({"task": {"base": result}}).axes
    values, edges, _ = axis.patches[0].get_data()
    assert (values[0], values[10], sum(values)) == (0.25, 0.75, 1.0)
    assert edges[1:] == pytest.approx(KLD_BIN_EDGES[1:])
    assert axis.get_xlim() == pytest.approx((edges[0], edges[11]))
    assert "leftmost bin" in axis.get_xlabel()


def test_models_without_a_histogram_are_left_out(run_report):
    base = replace(run_report.texts["task"]["base"], kld_histogram=None, kld=None)
    texts = {"task": {"base": base, "merged": run_report.texts["task"]["merged"]}}
    (axis,) = kld_figure(texts).axes
    assert [label.get_text().split()[0] for label in axis.get_legend().get_texts()] == ["merged"]
    assert kld_figure({"task": {"base": base}}) is None
