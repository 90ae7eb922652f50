"""A run folder is held by one process, and begins without what a killed run left half."""

import subprocess
import sys
from pathlib import Path

import pytest

from qatlora.errors import RunFolderError
from qatlora.run_folder import claimed

HOLDER = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from qatlora.run_folder import claimed\n"
    "with claimed(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def test_a_folder_in_use_is_refused_by_the_holders_process_id_until_that_dies(
    tmp_path: Path,
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunFolderError, match=f"process {holder.pid}:"), claimed(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with claimed(tmp_path):
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
