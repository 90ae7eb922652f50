"""recipe=plan from its settings to its report, for shipped architectures and for a folder."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from loaded_cases import on_grid_folder
from omegaconf import OmegaConf
from test_config import compose

from qatlora import pipeline
from qatlora.__main__ import main
from qatlora.base.layout import plain_config
from qatlora.config import Holds, RootConfig, Storage, to_dataclasses
from qatlora.config.rules import validate
from qatlora.errors import CheckpointError
from qatlora.paths import shipped
from qatlora.plan.choose import LEANEST, usable_bytes
from qatlora.plan.footprint import Job, footprint
from qatlora.plan.shape import model_shape
from qatlora.report.json_report import load_schema


def planned(run_dir: Path, **base: Any) -> dict:
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
    assert len(plan["fits"]) == 3 * 3 * 4 - 3  # NF4 is never its own teacher
    assert all(len(one["row_tokens"]) == len(plan["gpu_gb"]) for one in plan["fits"])
    recommended = plan["recommended"]
    assert 0 < recommended["peak_bytes"] < 24 * 2**30
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(command in text for command in recommended["commands"])
    assert "24 GB" in text


def test_a_folder_is_planned_by_its_config(tiny_multimodal_folder: Path, tmp_path: Path):
    report = planned(tmp_path, path=str(tiny_multimodal_folder))
    assert report["plan"]["bf16_bytes"] == 2 * report["base"]["parameters"]
    (command,) = report["plan"]["recommended"]["commands"]
    assert command.startswith(
        f"python -m qatlora recipe=chat_sft base.path={tiny_multimodal_folder}"
    )
    assert command.endswith(" teacher=bf16")


def test_of_a_model_on_the_hub_the_configuration_alone_is_fetched(
    tiny_multimodal_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert hub_id == "org/model"
        fetched = tmp_path / "snapshot"
        fetched.mkdir()
        for pattern in allow_patterns:
            for path in tiny_multimodal_folder.glob(pattern):
                shutil.copy(path, fetched)
        assert [path.name for path in fetched.iterdir()] == ["config.json"]
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    report = planned(tmp_path / "run", hub_id="org/model", holds=Holds.on_grid)
    (command,) = report["plan"]["recommended"]["commands"]
    assert command.startswith("python -m qatlora recipe=chat_sft base.hub_id=org/model")
    by_folder = planned(tmp_path / "folder", path=str(tiny_multimodal_folder))
    assert report["base"]["parameters"] == by_folder["base"]["parameters"]


@pytest.mark.parametrize(
    ("base", "teacher", "storage"),
    [
        ("gemma4_31b_it", "none", "q4_0"),
        ("gemma4_31b_it_qat", "self", "q4_0"),
        ("gemma4_31b_it_qat_nf4", "none", "nf4"),
        ("gemma4_12b_it", "cache", "q4_0"),
        ("gemma4_12b_it_qat", "self", "q4_0"),
    ],
)
def test_what_a_published_checkpoint_is_reported_to_hold_decides_teacher_and_storage(
    base: str, teacher: str, storage: str, tmp_path: Path
):
    settings = OmegaConf.to_container(OmegaConf.load(shipped("conf") / "base" / f"{base}.yaml"))
    holds = Holds[settings.pop("holds", "bf16")]
    report = planned(tmp_path, **settings, holds=holds)
    *_, command = report["plan"]["recommended"]["commands"]
    assert f" base={base} storage={storage} " in command
    assert f" teacher={teacher}" in command


@pytest.mark.parametrize("teacher", ["self", "cache"])
def test_where_no_teacher_fits_beside_the_base_the_commands_for_another_one_work(
    teacher: str,
    tiny_llama_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    base = tiny_llama_folder
    if teacher == "self":
        base = tmp_path / "on grid"
        on_grid_folder(tiny_llama_folder, base)
    shape, job = model_shape(plain_config(base)), Job("q4_0", "steps", tokens=128, **LEANEST)
    peaks = [
        footprint(shape, dataclasses.replace(job, teacher=one)).peak for one in (teacher, "memory")
    ]
    monkeypatch.chdir(tmp_path)
    typed(
        monkeypatch,
        "recipe=plan", f"base.path={base}", f"plan.gpu_gb={sum(peaks) / 2 / usable_bytes(1)}",
        "data=jsonl", f"data.path={files['chats']}", f"data.general={files['text']}",
        "data.max_length_tokens=128", "data.eval_tokens=64", "train.max_steps=2",
        "teacher.kl_weight=0.2",
        "guard.require_effect=false", "guard.llama_cpp=false", "run_dir=planned",
        "guard.drift_kld_increase_max_nats=10",
    )  # fmt: skip
    report = json.loads(Path("planned/report.json").read_text(encoding="utf-8"))
    commands = report["plan"]["recommended"]["commands"]
    assert len(commands) == (2 if teacher == "cache" else 1)
    assert all(" teacher.kl_weight=0.2 " in command for command in commands)
    for command in commands:
        typed(monkeypatch, *shlex.split(command)[3:])
    assert len(list(Path("runs").glob("**/*.gguf"))) == 1


@pytest.mark.parametrize(("gpu_gb", "num_commands"), [(7, 2), (24, 1)])
def test_weights_that_are_trained_are_planned_for_the_recipe_that_trains_them(
    gpu_gb: int, num_commands: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    lean = ["distill.latent=bf16", "train.optimizer=adamw_8bit"]
    typed(
        monkeypatch,
        "recipe=plan", "base=gemma3_1b_it", "storage=bf16", "distill.train=weights", *lean,
        f"plan.gpu_gb={gpu_gb}", "run_dir=planned",
    )  # fmt: skip
    plan = json.loads(Path("planned/report.json").read_text(encoding="utf-8"))["plan"]
    fits = {(one["storage"], one["adapter"], one["teacher"]) for one in plan["fits"]}
    assert fits == {("bf16", "weights", "cache"), ("bf16", "weights", "memory")}
    assert len(plan["recommended"]["commands"]) == num_commands
    for command in plan["recommended"]["commands"]:
        arguments = shlex.split(command)[3:]
        assert arguments[0] == "recipe=qat_distill"
        assert {"storage=bf16", *lean} < set(arguments)
        validate(to_dataclasses(compose(*arguments)))


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """As on the command line."""
    monkeypatch.setattr("sys.argv", ["qatlora", *arguments])
    main()


def test_an_unknown_architecture_names_the_choices(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"base\.architecture=gemma9.*gemma4_31b"):
        planned(tmp_path, architecture="gemma9")
