import json
import math
from dataclasses import replace

import pytest

from qatlora.report.json_report import ReportError
from qatlora.report.write import write_report


@pytest.mark.parametrize(
    ("fixture", "names"),
    [
        ("run_report", {"changes.png", "kld_histogram.png", "loss.png"}),
        ("failed_report", {"changes.png", "kld_histogram.png", "loss.png"}),
        ("bare_report", set()),
    ],
)
def test_a_run_folder_holds_the_report_and_its_plots(fixture, names, request, tmp_path):
    run_dir = tmp_path / "runs" / "a"
    write_report(request.getfixturevalue(fixture), run_dir)
    assert {path.name for path in run_dir.iterdir()} == {"report.json", "report.md", *names}
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    assert all(f"({name})" in text for name in names)
    json.loads((run_dir / "report.json").read_text(encoding="utf-8"))


def test_a_run_without_training_has_no_loss_plot(run_report, tmp_path):
    write_report(replace(run_report, train=None), tmp_path)
    assert not (tmp_path / "loss.png").exists()
    assert json.loads((tmp_path / "report.json").read_text())["train"] is None
    assert "## Training" not in (tmp_path / "report.md").read_text()


def test_a_figure_that_is_not_finite_stops_before_anything_is_written(run_report, tmp_path):
    broken = replace(run_report, base=replace(run_report.base, on_grid_share=math.nan))
    with pytest.raises(ReportError, match="base.on_grid_share is nan"):
        write_report(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_report_replaces_the_first(run_report, failed_report, tmp_path):
    write_report(run_report, tmp_path)
    write_report(failed_report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["export"] is None
    assert "Guard failed" in (tmp_path / "report.md").read_text()
