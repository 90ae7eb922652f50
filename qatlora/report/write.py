"""The report of a run: `report.json`, `report.md`, the plots and, of a comparison, a web page."""

from pathlib import Path

from qatlora.files import write_json, write_text
from qatlora.report.html import to_html
from qatlora.report.json_report import to_json
from qatlora.report.markdown import to_markdown
from qatlora.report.plots import write_plots
from qatlora.report.results import RunReport

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"
HTML_NAME = "report.html"


def write_report(report: RunReport, run_dir: Path) -> list[Path]:
    """Write the report of a run, passed or failed, complete or not; files are whole or absent.

    `report.json` comes last, so whoever finds it finds the rest as well.

    Returns:
        The files, plots first.

    Raises:
        ReportError: a figure is not finite; nothing was written then.
    """
    document = to_json(report)
    run_dir.mkdir(parents=True, exist_ok=True)
    plots = write_plots(report, run_dir)
    write_text(run_dir / MARKDOWN_NAME, to_markdown(report, plots))
    if report.fidelity is not None:
        images = {name: (run_dir / name).read_bytes() for name in plots}
        write_text(run_dir / HTML_NAME, to_html(report, images))
    write_json(run_dir / JSON_NAME, document)
    return [run_dir / name for name in (*plots, MARKDOWN_NAME, JSON_NAME)]
