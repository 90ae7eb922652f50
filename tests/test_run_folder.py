"""A run folder is held by one process, and begins without what a killed run left half."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qatlora.config import RootConfig
from qatlora.errors import RunFolderError
from qatlora.run_folder import claimed, claimed_cache
from qatlora.stages import teacher_cache
from qatlora.state import Run

HOLDER = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from qatlora import run_folder\n"
    "with getattr(run_folder, sys.argv[2])(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def held_by_another(folder: Path, claim: str) -> subprocess.Popen[str]:
    """A process that holds `folder` by the function `claim`."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), claim],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_folder_in_use_is_refused_by_the_holders_process_id_until_that_dies(
    tmp_path: Path,
) -> None:
    holder = held_by_another(tmp_path, "claimed")
    with pytest.raises(RunFolderError, match=f"process {holder.pid}:"), claimed(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with claimed(tmp_path):
        pass


def test_a_second_writer_of_a_teacher_cache_is_refused_by_the_firsts_process_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = RootConfig(run_dir=str(tmp_path / "run"))
    cfg.teacher.cache_path = str(tmp_path / "cache")
    run = Run.start(cfg)
    run.batches = SimpleNamespace(train=[])
    monkeypatch.setattr(teacher_cache, "_add_missing", lambda *_: pytest.fail("it has written"))
    holder = held_by_another(tmp_path / "cache", "claimed_cache")
    with pytest.raises(RunFolderError, match=rf"process {holder.pid}:.*teacher\.cache_path"):
        teacher_cache.teacher_cache(run)
    holder.kill()
    holder.communicate()


def test_a_cache_may_lie_in_the_run_folder_itself(tmp_path: Path) -> None:
    with claimed(tmp_path), claimed_cache(tmp_path):
        pass


def test_parts_of_a_killed_run_are_removed_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / ".candidate").mkdir()
    (tmp_path / ".candidate" / "half.gguf").write_bytes(b"GG")
    (tmp_path / ".merged-x1y2").mkdir()
    (tmp_path / ".merged-x1y2" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".report.json.123.partial").write_text("{")
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / ".git").mkdir()
    with claimed(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "report.json", ".git"}
