"""recipe=plan from its settings to its report, for shipped architectures and for a folder."""

import json
from pathlib import Path

import jsonschema
import pytest

from qatlora import pipeline
from qatlora.config import RootConfig, Storage
from qatlora.errors import CheckpointError
from qatlora.report.json_report import load_schema


def planned(run_dir: Path, **base: str) -> dict:
    cfg = RootConfig(stages=["plan", "report"], run_dir=str(run_dir))
    cfg.card.name, cfg.base.name = "plan", "tiny"
    for key, value in base.items():
        setattr(cfg.base, key, value)
    cfg.storage.kind = Storage.q4_0
    pipeline.run(cfg)
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, load_schema())
    return report


def test_a_published_base_is_planned_without_its_checkpoint(tmp_path: Path):
    report = planned(tmp_path, architecture="gemma4_e4b")
    plan = report["plan"]
    assert [one["storage"] for one in plan["storages"]] == ["nf4", "q4_0", "bf16"]
    assert len(plan["fits"]) == 3 * 3 * 3
    assert all(len(one["row_tokens"]) == len(plan["gpu_gb"]) for one in plan["fits"])
    recommended = plan["recommended"]
    assert 0 < recommended["peak_bytes"] < 24 * 2**30
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(override in text for override in recommended["overrides"])
    assert "24 GB" in text


def test_a_folder_is_planned_by_its_config(tiny_multimodal_folder: Path, tmp_path: Path):
    report = planned(tmp_path, path=str(tiny_multimodal_folder))
    assert report["plan"]["bf16_bytes"] == 2 * report["base"]["parameters"]
    assert report["plan"]["recommended"]["overrides"][:3] == [
        "storage=q4_0", "adapter=lora", "teacher=bf16",
    ]  # fmt: skip


def test_an_unknown_architecture_names_the_choices(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"base\.architecture=gemma9.*gemma4_31b"):
        planned(tmp_path, architecture="gemma9")
