"""What recipe=doctor shows: a line per finding, and the commands that help."""

from qatlora.report.results_doctor import OK, DoctorResult

DOCTOR_HEADER = ("area", "what", "status", "found")


def doctor_headline(result: DoctorResult) -> str:
    """Whether the default run can work here."""
    if result.missing:
        names = ", ".join(finding.name for finding in result.missing)
        return f"Missing for the default run: {names}."
    return "Nothing that the default run needs is missing."


def doctor_rows(result: DoctorResult) -> list[list[str]]:
    """Cells in the order of `DOCTOR_HEADER`."""
    return [[one.area, one.name, one.status, one.found] for one in result.findings]


def remedies(result: DoctorResult) -> list[str]:
    """What helps, for each finding that is not as it could be."""
    return [
        f"{one.name}: {one.remedy}" for one in result.findings if one.remedy and one.status != OK
    ]
