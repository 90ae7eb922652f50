"""The stage `report`: what the stages have left, as files and as a table in the terminal."""

from qatlora import progress
from qatlora.report.console import to_console
from qatlora.report.write import write_report
from qatlora.state import Run, report_of


def report(state: Run) -> None:
    """Write report.json, report.md and the plots, track them, and print the table."""
    figures = report_of(state)
    written = write_report(figures, state.run_dir)
    state.tracker.report(figures, written)
    progress.console.print(to_console(figures))
