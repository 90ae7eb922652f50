"""recipe=teacher_cache and the teachers of a run, on tiny models: cache, self, and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from loaded_cases import edited_folder, on_grid_folder
from pipeline_cases import STAGES, settings
from safetensors import safe_open

from qatlora import pipeline
from qatlora.config import (
    AdapterKind,
    DivergenceKind,
    LatentSteps,
    OtherType,
    Precision,
    RootConfig,
    Storage,
    TeacherKind,
    Trained,
)
from qatlora.distill import top_words
from qatlora.errors import CacheError, ConfigError
from qatlora.report.json_report import load_schema
from qatlora.report.results import RunReport

TRAINED = STAGES[: STAGES.index("train") + 1]
ALL_WORDS = 383
"""Words of a tiny vocabulary but one: a cache that loses nothing but the digits of float16."""


@pytest.fixture(scope="session")
def on_grid_base(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("on_grid") / "base"
    on_grid_folder(tiny_llama_folder, folder)
    return folder


class Runs:
    """Runs on one base that differ in a few settings, each in a folder of its own."""

    def __init__(self, base: Path, data: dict[str, Path], folder: Path) -> None:
        self._base, self._data, self._folder = base, data, folder
        self.cache = folder / "cache"
        self._number = 0

    def config(self, stages: list[str], **changes: Any) -> RootConfig:
        self._number += 1
        cfg = settings(self._base, self._data, self._folder / f"run{self._number}")
        cfg.stages, cfg.storage.kind = list(stages), Storage.q4_0
        cfg.train.precision = Precision.fp32
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            setattr(getattr(cfg, section) if section else cfg, name, value)
        return cfg

    def write(self, **changes: Any) -> RunReport:
        changes = {"teacher__cache_path": str(self.cache), "teacher__cache_top_k": 64} | changes
        stages = ["preflight", "load_data", "teacher_cache", "report"]
        return pipeline.run(self.config(stages, **changes))

    def train(self, **changes: Any) -> RunReport:
        return pipeline.run(self.config(TRAINED, **changes))

    def from_cache(self, **changes: Any) -> RunReport:
        cached = {"teacher__kind": TeacherKind.cache, "teacher__path": str(self.cache)}
        return self.train(**cached | changes)


@pytest.fixture
def runs(tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path: Path) -> Runs:
    return Runs(tiny_gemma3_folder, files, tmp_path)


def losses(report: RunReport) -> list[float]:
    assert report.train is not None
    return [point.loss for point in report.train.history]


def require_close(cached: RunReport, online: RunReport) -> None:
    """The first loss shows float16 alone; updates of levels near a boundary then part the two."""
    (first, *later), (wanted_first, *wanted_later) = losses(cached), losses(online)
    assert first == pytest.approx(wanted_first, rel=1e-3, abs=1e-4)
    assert later == pytest.approx(wanted_later, rel=1e-2, abs=5e-4)


def contents(folder: Path) -> dict[str, Any]:
    """Row digest -> bytes of its tensors, over all shards of a cache."""
    found = {}
    for path in folder.glob("rows-*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        counts = tensors.pop("counts").tolist()
        keys = [bytes(key) for key in tensors.pop("keys").tolist()]
        parts = {name: tensor.split(counts) for name, tensor in sorted(tensors.items())}
        for number, key in enumerate(keys):
            found[key] = [part[number].tolist() for part in parts.values()]
    return found


@pytest.mark.parametrize(
    ("weights", "divergence", "packing"),
    [((1.0, 0.5, 1.0), "forward_kl", True), ((0.0, 0.0, 1.0), "jsd", False)],
)
def test_training_from_a_cache_of_nearly_all_words_equals_the_online_teacher(
    weights: tuple, divergence: str, packing: bool, runs: Runs
) -> None:
    names = ("ce_weight", "kl_weight", "general_kl_weight")
    changes: dict[str, Any] = {
        f"teacher__{name}": value for name, value in zip(names, weights, strict=True)
    }
    changes |= {"teacher__divergence": DivergenceKind[divergence], "data__packing": packing}
    runs.write(teacher__cache_top_k=ALL_WORDS, **changes)
    online, cached = runs.train(**changes), runs.from_cache(**changes)
    require_close(cached, online)
    assert losses(online)[0] != losses(online)[-1]
    for text in ("task", "general"):  # scored in full, from the same states
        wanted = online.texts[text]["base"].kld
        assert wanted is not None
        assert cached.texts[text]["base"].kld == wanted


def test_training_from_64_words_loses_no_more_than_the_report_says(runs: Runs) -> None:
    changes = {"teacher__ce_weight": 0.0, "train__learning_rate": 1e-6}
    report = runs.write(**changes)
    assert report.teacher_cache is not None
    points = {p.text: p for p in report.teacher_cache.points if p.top_k == 64}
    online, cached = runs.train(**changes), runs.from_cache(**changes)
    lost = [a - b for a, b in zip(losses(online), losses(cached), strict=True)]
    said = 0.1 * (points["task"].full - points["task"].kept) + (
        points["general"].full - points["general"].kept
    )
    assert all(0 < each < 1.5 * said for each in lost)


def test_the_report_tells_size_and_what_more_words_would_keep(runs: Runs) -> None:
    runs.write()
    (run_dir,) = runs.cache.parent.glob("run1")
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, load_schema())
    result = report["teacher_cache"]
    assert result["rows"] == result["added_rows"] == 16
    assert result["bytes"] == pytest.approx(result["tokens"] * (64 * 4 + 2), rel=0.05)
    for text in ("task", "general"):
        points = [point for point in result["points"] if point["text"] == text]
        assert [point["top_k"] for point in points] == [8, 16, 32, 64, 128, 256]
        kept = [point["kept"] for point in points]
        assert kept == sorted(kept)
        assert points[0]["full"] > kept[-1] > 0.8 * points[0]["full"]
    assert (run_dir / "teacher_cache.png").is_file()
    assert "What the cache keeps" in (run_dir / "report.md").read_text(encoding="utf-8")


def test_a_killed_build_goes_on_and_equals_an_uninterrupted_one(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qatlora.distill.cache._SHARD_TOKENS", 100)
    whole = runs.cache.with_name("whole")
    runs.write(teacher__cache_path=str(whole))

    class Killed(Exception):
        pass

    calls = []

    def dies_in_the_third_group(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise Killed
        return top_words(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("qatlora.stages.teacher_cache.top_words", dies_in_the_third_group)
        with pytest.raises(Killed):
            runs.write()
    assert contents(runs.cache).keys() < contents(whole).keys()
    with pytest.raises(CacheError, match=r"rows to train.*cut off"):
        runs.from_cache()
    report = runs.write()
    assert report.teacher_cache is not None
    assert 0 < report.teacher_cache.added_rows < report.teacher_cache.rows
    found, wanted = contents(runs.cache), contents(whole)
    assert found.keys() == wanted.keys()
    same = [found[key] == wanted[key] for key in wanted]
    assert sum(same) >= len(same) - 4  # a group that was cut elsewhere is rounded elsewhere
    runs.from_cache()


def test_a_longer_course_adds_its_rows_and_a_shorter_one_needs_none(runs: Runs) -> None:
    runs.write(train__max_steps=2)
    with pytest.raises(CacheError, match="train.max_steps=2 there, 4 here"):
        runs.from_cache()
    report = runs.write()
    assert report.teacher_cache is not None
    assert report.teacher_cache.added_rows == report.teacher_cache.rows / 2
    assert runs.write(train__max_steps=3).teacher_cache.added_rows == 0
    runs.from_cache()


def test_only_rows_whose_loss_asks_for_the_teacher_are_kept(runs: Runs) -> None:
    report = runs.write(teacher__kl_weight=0.0)
    assert report.teacher_cache is not None
    assert report.teacher_cache.rows == 4
    runs.from_cache(teacher__kl_weight=0.0)
    with pytest.raises(CacheError, match="12 of the 16 rows"):
        runs.from_cache()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher__temperature": 2.0}, r"temperature 1\.0 there, 2\.0 here"),
        ({"data__max_length_tokens": 96}, "data.max_length_tokens=128 there, 96 here"),
        ({"data__eval_tokens": 32}, "lacks the held-out text 'task'"),
    ],
)
def test_a_cache_for_other_settings_is_refused(changes: dict, words: str, runs: Runs) -> None:
    runs.write()
    with pytest.raises(CacheError, match=words):
        runs.from_cache(**changes)


def test_a_cache_of_another_base_or_template_is_refused(
    runs: Runs, tiny_gemma3_folder: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    runs.write()
    with pytest.raises(CacheError, match=r"made from something else: teacher \w+ there"):
        runs.from_cache(base__path=str(tiny_llama_folder))
    other = tmp_path / "other_template"
    shutil.copytree(tiny_gemma3_folder, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# a remark #}")
    with pytest.raises(CacheError, match=r"something else: template \w+ there, \w+ here\. "):
        runs.from_cache(base__path=str(other))


def test_a_cache_serves_weights_that_are_trained_themselves(runs: Runs) -> None:
    changes: dict[str, Any] = {
        "storage__kind": Storage.bf16,
        "distill__train": Trained.weights,
        "distill__steps": LatentSteps.frozen,
        "teacher__ce_weight": 0.0,
        "train__learning_rate": 0.07,
    }
    runs.write(teacher__cache_top_k=ALL_WORDS)
    online, cached = runs.train(**changes), runs.from_cache(**changes)
    require_close(cached, online)


def test_the_base_is_its_own_teacher_to_the_last_digit_where_it_keeps_bf16(runs: Runs) -> None:
    changes = {
        "storage__kind": Storage.bf16,
        "export__other_type": OtherType.bf16,  # leaves the embeddings as they are
        "adapter__kind": AdapterKind.both,
    }
    online = runs.train(**changes)
    own = runs.train(teacher__kind=TeacherKind.self, **changes)
    assert losses(own) == losses(online)
    assert own.texts == online.texts


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32])
def test_a_packed_base_on_its_grid_is_its_own_teacher(
    precision: Precision, on_grid_base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    runs = Runs(on_grid_base, files, tmp_path)
    changes = {"export__other_type": OtherType.bf16, "train__precision": precision}
    online = runs.train(**changes)
    own = runs.train(teacher__kind=TeacherKind.self, **changes)
    if precision is Precision.bf16:
        assert losses(own) == losses(online)
    else:  # the checkpoint holds step * level rounded to bf16, and every step widens the difference
        assert losses(own)[0] == pytest.approx(losses(online)[0], rel=2e-6)
    kld = own.texts["general"]["base"].kld
    assert kld is not None
    assert kld.mean == 0


def test_a_packed_base_off_the_grid_is_no_teacher(runs: Runs) -> None:
    with pytest.raises(ConfigError, match="packing has rounded the others"):
        runs.train(teacher__kind=TeacherKind.self)


def test_a_teacher_of_other_words_is_refused_in_the_preflight(
    runs: Runs, tiny_llama_folder: Path, tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    for stages in (["preflight", "load_base"], ["preflight", "load_data", "teacher_cache"]):
        cfg = runs.config(stages, teacher__path=str(tiny_llama_folder))
        with pytest.raises(ConfigError, match="another vocabulary than the base"):
            pipeline.run(cfg)
    padded = edited_folder(tiny_gemma3_folder, tmp_path / "padded", vocab_size=448)
    cfg = runs.config(["preflight", "load_base"], teacher__path=str(padded))
    with pytest.raises(ConfigError, match="448 rows in its output layer"):
        pipeline.run(cfg)


def test_a_teacher_of_another_template_is_refused_only_where_it_hears_chats(
    runs: Runs, tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_gemma3_folder, other)
    template = other / "chat_template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    cfg = runs.config(["preflight", "load_base"], teacher__path=str(other))
    with pytest.raises(ConfigError, match="another chat template than the base"):
        pipeline.run(cfg)
    cfg.teacher.kl_weight = 0.0
    pipeline.run(cfg)


def test_more_words_than_there_are_cannot_be_kept(runs: Runs) -> None:
    with pytest.raises(ConfigError, match=r"cache_top_k=384: the teacher has 384 words"):
        runs.write(teacher__cache_top_k=384)
