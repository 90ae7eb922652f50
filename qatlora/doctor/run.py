"""`recipe=doctor`: look at every area, show it, write report.json, fail if something is missing."""

import importlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qatlora import __version__, files, progress
from qatlora.config import RootConfig
from qatlora.doctor import Patient
from qatlora.errors import ToolError
from qatlora.report.console import to_console
from qatlora.report.json_report import to_json
from qatlora.report.results import RunReport, StageTime
from qatlora.report.results_doctor import MISSING, DoctorResult, Finding
from qatlora.report.write import JSON_NAME

AREAS = ("packages", "machine", "files", "logins")
"""Modules of this room, each with `findings(patient)`."""


def run(cfg: RootConfig) -> RunReport:
    """Examine the machine and show what was found; report.json holds the same.

    Raises:
        ToolError: something that the default run needs is missing.
    """
    start = time.monotonic()
    run_dir = Path(cfg.run_dir)
    result = examine(Patient(run_dir, cfg.logging.report_to.name))
    report = RunReport(
        recipe=cfg.card.name,
        base=None,
        doctor=result,
        stages=[StageTime("doctor", time.monotonic() - start)],
        versions={"qatlora": __version__},
    )
    progress.console.print(to_console(report))
    files.write_json(run_dir / JSON_NAME, to_json(report))
    if result.missing:
        what = "; ".join(f"{one.name} ({one.found}): {one.remedy}" for one in result.missing)
        raise ToolError(f"The default run needs what is missing here. {what}")
    return report


def examine(patient: Patient) -> DoctorResult:
    """The findings of all areas; an area that cannot be looked at is a finding, too."""
    with ThreadPoolExecutor() as pool:  # some wait for a process
        found = pool.map(lambda area: _findings(area, patient), AREAS)
        return DoctorResult([finding for findings in found for finding in findings])


def _findings(area: str, patient: Patient) -> list[Finding]:
    try:
        return list(importlib.import_module(f"qatlora.doctor.{area}").findings(patient))
    except Exception as problem:  # a half-broken environment is what the doctor is for
        remedy = "pip install -c constraints.txt -e '.[demo]'"
        return [Finding(area, "look", MISSING, f"{type(problem).__name__}: {problem}", remedy)]
