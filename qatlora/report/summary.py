"""What a reader must see first, in plain text: the verdict and what the run did to the model."""

from dataclasses import dataclass

from qatlora.report.cache_text import cache_facts
from qatlora.report.doctor_text import doctor_headline, remedies
from qatlora.report.fidelity_text import headlines, self_klds
from qatlora.report.formatting import MISSING, format_bytes, format_figure, format_share
from qatlora.report.inspect_text import advice, headline
from qatlora.report.plan_text import plan_headline
from qatlora.report.preview_text import headline as preview_headline
from qatlora.report.preview_text import losses, preview_facts
from qatlora.report.results import BaseResult, RunReport, TextResult
from qatlora.report.results_build import BuildResult
from qatlora.report.run_it import run_line, runs_in_llama_cpp
from qatlora.report.validate_text import validate_headline, validate_reasons


@dataclass(frozen=True)
class Verdict:
    """The outcome in one sentence.

    Attributes:
        headline: the sentence, without what is in `reasons`.
        good: True for a guard that passed, False for one that failed, None where none ran.
        reasons: one line per gate that failed, and the reason of an override; what an inspection
            or a validation means.
    """

    headline: str
    good: bool | None
    reasons: list[str]


def verdict(report: RunReport) -> Verdict:
    """The verdict on `report`: what the guard said, what was found, or what was built."""
    if report.validate is not None:
        good = None if report.guard is None else report.guard.passed
        reasons = validate_reasons(report.validate, report.guard)
        return Verdict(validate_headline(report.validate, report.guard), good, reasons)
    if report.inspect is not None:
        good = True if report.inspect.kind == "on_grid" else None
        return Verdict(headline(report.inspect), good, advice(report.inspect))
    if report.doctor is not None:
        good = not report.doctor.missing
        return Verdict(doctor_headline(report.doctor), good, remedies(report.doctor))
    if report.plan is not None:
        return Verdict(plan_headline(report.plan), None, report.plan.recommended.commands)
    if report.preview is not None:
        return Verdict(preview_headline(report.preview), None, losses(report.preview))
    if report.build is not None:
        reasons = headlines(report.fidelity) if report.fidelity else []
        return Verdict(f"{_BUILT[report.build.storage]} built.", None, reasons)
    if report.teacher_cache is not None:
        return Verdict("Teacher cache written.", None, [])
    if report.fidelity is not None:
        first, *others = headlines(report.fidelity) or ["Every reference equals itself."]
        return Verdict(first, None, others)
    if report.patch is not None and report.guard is None:
        return Verdict("Patched: by its SHA-256 it is the file that was exported.", True, [])
    published = "published" if report.export else "nothing was published"
    if report.guard is None:
        return Verdict(f"No guard in this recipe; {published}.", None, [])
    failed = [gate for gate in report.guard.gates if gate.status == "failed"]
    skipped = [gate.name for gate in report.guard.gates if gate.status == "skipped"]
    note = f" Skipped: {', '.join(skipped)}." if skipped else ""
    if report.guard.passed and not failed:
        return Verdict(f"Guard passed; {published}.{note}", True, [])
    reasons = [f"{gate.name}: {gate.message}" for gate in failed]
    if report.guard.override:
        reasons.append(f"override: {report.guard.override}")
        published = f"{published} by override" if report.export else published
    names = ", ".join(gate.name for gate in failed) or "no gate is named"
    return Verdict(f"Guard failed ({names}); {published}.{note}", False, reasons)


def facts(report: RunReport) -> list[tuple[str, str]]:
    """Pairs of a label and plain text: what was made, its effect; only those that are known."""
    lines: list[tuple[str, str]] = []
    if report.fidelity:
        lines += self_klds(report.fidelity)
    if report.build:
        lines += _build_facts(report.build, report.base)
    if report.teacher_cache:
        lines += cache_facts(report.teacher_cache)
    if report.validate:
        lines.append((report.validate.what, report.validate.path))
        lines.append(("base", report.validate.base))
    if report.preview:
        lines += preview_facts(report.preview)
    if report.export:
        size = format_bytes(report.export.bytes)
        types = ", ".join(f"{count} {name}" for name, count in report.export.tensor_types.items())
        lines.append(("file", report.export.path))
        lines.append(("size", f"{size}, tensors: {types}" if types else size))
        lines.append(("sha256", report.export.sha256))
        if runs_in_llama_cpp(report):
            lines.append(("run it", run_line(report)))
    if report.patch:
        share = format_share(report.patch.bytes / report.patch.base_bytes)
        lines.append(("step patch", report.patch.path))
        size = f"{format_bytes(report.patch.bytes)}, {share} of the base's {report.patch.base}"
        lines.append(("patch size", size))
    if report.checkpoint:
        lines.append(("checkpoint", report.checkpoint.path))
        share = format_share(report.checkpoint.on_grid_share)
        differing = format_figure(report.checkpoint.differing_blocks)
        lines.append(("on its grid", f"{share} of the blocks; recovered otherwise: {differing}"))
    for text, results in report.texts.items():
        final = next((name for name in ("merged", "trained") if name in results), None)
        if "base" in results and final:
            lines.append((f"{text} text", _course(results["base"], results[final], final)))
    return lines


_BUILT = {"q4_0": "Packed Q4_0 folder", "nf4": "Public NF4 folder"}


def _build_facts(build: BuildResult, base: BaseResult) -> list[tuple[str, str]]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in build.modules.items())
    lines = [
        ("folder", build.path),
        ("size", f"{format_bytes(build.bytes)}, source {format_bytes(build.source_bytes)}"),
        ("quantized", f"{sum(build.modules.values())} linears: {kinds}"),
        ("on a grid", f"{format_share(base.on_grid_share)} of their blocks in the source"),
        ("relative error", format_share(build.relative_error)),
        ("digest as a base", base.digest),
    ]
    if build.continuation is not None:
        lines.append(("a look at it", f"{build.prompt} -> {build.continuation}"))
    return lines


def score_rows(report: RunReport) -> list[list[str]]:
    """Cells of the table of perplexity and KLD, in the order of `SCORE_HEADER`."""
    return [
        [text, model, *_score_cells(result)]
        for text, results in report.texts.items()
        for model, result in results.items()
    ]


SCORE_HEADER = (
    "text",
    "model",
    "tokens",
    "perplexity",
    "KLD mean",
    "KLD median",
    "KLD p99",
    "same top",
)


def _score_cells(result: TextResult) -> list[str]:
    stderr = result.perplexity * result.nll_stderr  # of exp(mean): first order in the mean's error
    kld = result.kld
    return [
        format_figure(result.tokens),
        f"{format_figure(result.perplexity, decimals=True)} ± {stderr:.2g}",
        *(
            format_figure(value, decimals=True)
            for value in ((kld.mean, kld.median, kld.p99) if kld else (None, None, None))
        ),
        format_share(kld.same_top) if kld else MISSING,
    ]


def _course(base: TextResult, final: TextResult, name: str) -> str:
    course = (
        f"perplexity {format_figure(base.perplexity, decimals=True)} (base) to "
        f"{format_figure(final.perplexity, decimals=True)} ({name})"
    )
    if base.kld and final.kld:
        course += (
            f", mean KLD to the teacher {format_figure(base.kld.mean, decimals=True)} to "
            f"{format_figure(final.kld.mean, decimals=True)} nats per token"
        )
    return course
