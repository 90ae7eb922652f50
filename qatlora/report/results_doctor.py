"""What the recipe doctor leaves."""

from dataclasses import dataclass

OK, NOTE, MISSING = "ok", "note", "missing"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: packages, machine, files or logins.
        name: what it is.
        status: ok, note (something works less well, or is fetched later) or missing (the default
            run cannot work).
        found: what is there.
        remedy: the command or setting that helps; None where nothing need be done.
    """

    area: str
    name: str
    status: str
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class DoctorResult:
    """All findings, area by area."""

    findings: list[Finding]

    @property
    def missing(self) -> list[Finding]:
        """What the default run cannot do without."""
        return [finding for finding in self.findings if finding.status == MISSING]
