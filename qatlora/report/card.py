"""README.md of what a run made, as model hubs show it: a published GGUF, or a built folder.

Everything in it comes from the run's report. The YAML at its head is what the Hugging Face hub
reads (https://huggingface.co/docs/hub/model-cards).
"""

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import yaml

from qatlora.report.card_build import build_sections
from qatlora.report.escape import fenced, inline, visible
from qatlora.report.results import RunReport
from qatlora.report.results_origin import OriginResult
from qatlora.report.run_it import run_it
from qatlora.report.run_sections import (
    bullets,
    gate_table,
    score_table,
    training_line,
    versions_line,
    what_was_trained,
)
from qatlora.report.summary import verdict

CARD = "README.md"
_TRAIN_KEYS = (
    "learning_rate", "steps_learning_rate", "lr_scheduler", "warmup_ratio", "weight_decay",
    "rows_per_step",
)  # fmt: skip
_TEACHER_KEYS = ("kind", "ce_weight", "kl_weight", "general_kl_weight", "divergence")


def model_card(report: RunReport) -> str:
    """The text of the card."""
    sections = build_sections(report) if report.build else _file_sections(report)
    parts = [_front_matter(report), *sections, "## Licence", _licence(report.origin)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: RunReport) -> str:
    origin = report.origin or OriginResult()
    front: dict[str, Any] = {
        "license": _on_one_line(origin.licence),
        "license_name": _on_one_line(origin.licence_name),
        "license_link": _on_one_line(origin.licence_link),
        "base_model": _on_one_line(origin.hub_id),
    }
    if report.build:
        is_nf4 = report.build.storage == "nf4"
        front["library_name"] = "transformers" if is_nf4 else None
        front["base_model_relation"] = origin.hub_id and "quantized"
        front["tags"] = ["qatlora", report.build.storage, *(["bitsandbytes"] if is_nf4 else [])]
    else:
        front["library_name"] = "gguf"
        front["pipeline_tag"] = "text-generation"
        front["base_model_relation"] = origin.hub_id and "finetune"
        front["datasets"] = _hub_data(report)
        front["tags"] = ["qatlora", "gguf", "q4_0"]
    known = {key: value for key, value in front.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=math.inf)}---"


def _on_one_line(text: str | None) -> str | None:
    """A line of dashes inside a value would end the YAML for readers that look for one."""
    return text and " ".join(visible(text).split())


def _hub_data(report: RunReport) -> list[str]:
    hub_id = report.settings.get("data", {}).get("hub_id") or ""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id)  # a folder may stand there, too
    return [hub_id] if is_id and report.train else []


def _file_sections(report: RunReport) -> Iterator[str]:
    assert report.export is not None
    path = PurePath(report.export.path)
    name = report.base.name if report.base else path.stem
    yield f"# {inline(path.stem)}"
    yield (
        f"{inline(name)}, trained inside the Q4_0 grid of llama.cpp and written block for block by "
        "qatlora, without a quantization afterwards."
    )
    outcome = verdict(report)
    yield "\n".join(f"> {inline(line)}" for line in [outcome.headline, *outcome.reasons])
    yield "## Run it"
    yield from run_it(report, beside=True)
    yield "## Figures"
    yield from score_table(report)
    if report.guard:
        yield gate_table(report.guard)
    yield "## Training"
    yield "\n".join(f"- {label}: {inline(text)}" for label, text in what_was_trained(report))
    if report.train:
        yield training_line(report.train)
        yield "\n".join(bullets(_training_settings(report.settings)))
    if report.data_notes:
        yield "## Data"
        yield "\n".join(bullets(report.data_notes))
    yield "## How it was made"
    yield fenced(_command(report), "sh")
    yield f"{versions_line(report)}. SHA-256 of the file: `{report.export.sha256}`."


def _training_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that decide what was learned; a saved adapter has them in its own run's report."""
    parts = {"train": _TRAIN_KEYS, "teacher": _TEACHER_KEYS}
    found = {
        f"{part}.{key}": getattr(value, "name", value)
        for part, keys in parts.items()
        for key in keys
        if (value := settings.get(part, {}).get(key)) is not None
    }
    # Left to its default it follows the other rate, which alone would say nothing of the steps.
    found.setdefault("train.steps_learning_rate", "ten times train.learning_rate")
    return found | {"seed": settings.get("seed")}


def _command(report: RunReport) -> str:
    typed = report.settings.get("overrides") or [f"recipe={report.recipe}"]
    return f"python -m qatlora {shlex.join(typed)}"


def _licence(origin: OriginResult | None) -> str:
    """What the base's own card says, and no more."""
    origin = origin or OriginResult()
    made = f"The base was made by {inline(origin.author)}. " if origin.author else ""
    if origin.licence is None:
        return (
            f"{made}The base's folder names no licence. Look where it came from: its terms hold "
            "for this work, too, and so do those of the data."
        )
    called = f" ({inline(origin.licence_name)})" if origin.licence_name else ""
    text = f"; its text: {inline(origin.licence_link)}" if origin.licence_link else ""
    return (
        f"{made}The base's own card says {inline(origin.licence)}{called}{text}. These terms hold "
        "for this work, too, and so do those of the data."
    )
