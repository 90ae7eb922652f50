"""The driver's probes, against converters that do to a tensor what no real one should.

The driver lives in a process of its own, beside llama.cpp's packages, and so do these cases.
"""

import json
import os
import subprocess
import textwrap
from pathlib import Path

import pytest

from qatlora.llamacpp import source

FAKE = """
import sys, torch
sys.path.append(sys.argv[1])
import converter_driver as driver

class Fake:
    def __init__(self, change):
        self.change = change
    def filter_tensors(self, item):
        return item
    def modify_tensors(self, tensor, name, block):
        assert block == 3
        return [(f"blk.{block}.out", part) for part in self.change(tensor)]

def place(change, shape=(6, 32)):
    name, shape, order = driver._place(Fake(change), "layers.3.weight", shape)
    return list(shape), order.tolist()

def refusal(change):
    try:
        place(change)
    except driver.DriverError as error:
        return str(error)

assert place(lambda t: [t]) == ([6, 32], [0, 1, 2, 3, 4, 5])
assert place(lambda t: [t.flip(0)]) == ([6, 32], [5, 4, 3, 2, 1, 0])
assert place(lambda t: [t[:4]]) == ([4, 32], [0, 1, 2, 3])
assert place(lambda t: [t.swapaxes(0, 1)], (2, 3, 32)) == ([3, 2, 32], [0, 3, 1, 4, 2, 5])
for change in (
    lambda t: [t.flip(1)], lambda t: [t.T], lambda t: [t + 1], lambda t: [t[:, :16]],
    lambda t: [t.roll(1, 1)],
):
    assert "changes the columns" in refusal(change)
assert "makes 2 tensors" in refusal(lambda t: t.chunk(2))
assert "makes 0 tensors" in refusal(lambda t: [])
"""


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_rows_are_followed_and_changed_columns_are_refused(tmp_path: Path):
    command, environment = source.converter_command()
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE))
    folder = str(Path(source.__file__).parent)
    subprocess.run([command[0], "-P", str(script), folder], env=environment, check=True)


@pytest.mark.llama_cpp
def test_a_converter_whose_run_has_ended_writes_nothing(tmp_path: Path):
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"parent": os.getppid(), "output": str(tmp_path / "out.gguf")}))
    command, environment = source.converter_command(str(request))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the run that called the converter has ended" in done.stderr
    assert not (tmp_path / "out.gguf").exists()
