"""Devices, compilers, memory and disk."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qatlora.doctor import Patient
from qatlora.memory import available_bytes
from qatlora.paths import cache_folder
from qatlora.report.formatting import format_bytes
from qatlora.report.results_doctor import MISSING, NOTE, OK, Finding

_AREA = "machine"
_PROBE = Path(__file__).with_name("probe.py")
_PROBE_SECONDS = 300
_DEFAULT_RUN_MEMORY_BYTES = 4.5e9  # measured: 4.4 GB
_DEFAULT_RUN_DISK_BYTES = 2e9  # the base unpacked, the texts, checkpoints, two copies of the file
_COMPILERS = ("c++", "g++", "clang++", "cl")


def findings(patient: Patient) -> Iterator[Finding]:
    """CPU and GPUs as torch sees them, what can compile, free memory and disk."""
    yield from _devices()
    yield _compile()
    memory = available_bytes()
    remedy = "close other programs, or take a smaller base (base=smollm2_135m storage=q4_0)"
    yield _enough("free memory", memory, _DEFAULT_RUN_MEMORY_BYTES, "", remedy)
    for folder, remedy in (
        (patient.run_dir, "make room, or set run_dir=FOLDER"),
        (cache_folder(), "make room, or set QATLORA_CACHE=FOLDER"),
    ):
        existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        free = shutil.disk_usage(existing).free
        yield _enough("free disk", free, _DEFAULT_RUN_DISK_BYTES, f" at {existing}", remedy)


def _devices() -> Iterator[Finding]:
    probed = _probe()
    if isinstance(probed, str):
        yield Finding(_AREA, "torch", MISSING, probed, "pip install -c constraints.txt torch")
        return
    bf16 = ", ".join(probed["cpu_bf16"]) or "no bf16 instructions: slower in bf16 than with them"
    yield Finding(_AREA, "CPU", OK, f"{probed['cpu']}, {probed['threads']} threads, {bf16}")
    for gpu in probed["gpus"]:
        bf16 = "bf16" if gpu["bf16"] else "no bf16 in hardware"
        found = f"{gpu['name']}, {format_bytes(gpu['bytes'])}, compute {gpu['capability']}, {bf16}"
        yield Finding(_AREA, "GPU", OK if gpu["bf16"] else NOTE, found)
    if not probed["gpus"]:
        yield Finding(_AREA, "GPU", NOTE, f"none that torch {probed['torch']} can use")
    if probed["bitsandbytes"] is not None:
        remedy = "pip install -c constraints.txt bitsandbytes, or storage=q4_0"
        yield Finding(_AREA, "bitsandbytes", MISSING, probed["bitsandbytes"], remedy)


def _probe() -> dict[str, Any] | str:
    """What torch says in a process of its own; a line of text where it cannot be asked."""
    try:
        run = subprocess.run(
            [sys.executable, "-P", str(_PROBE)],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"its import did not end within {_PROBE_SECONDS} s"
    except (ValueError, IndexError):
        last_line = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        return f"cannot be imported: {last_line}"
    return found


def _compile() -> Finding:
    """Whether the elementwise chains of a deployed weight can become kernels."""
    triton = importlib.util.find_spec("triton") is not None
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    chosen = os.environ.get("QATLORA_COMPILE", "auto")
    found = (
        f"QATLORA_COMPILE={chosen}; on CUDA: {'Triton' if triton else 'no Triton'}; "
        f"on the CPU: {compiler or 'no C++ compiler'}"
    )
    return Finding(_AREA, "torch.compile", OK, found)


def _enough(name: str, free: int, needed: float, where: str, remedy: str) -> Finding:
    if free >= needed:
        return Finding(_AREA, name, OK, format_bytes(free) + where)
    found = f"{format_bytes(free)}{where}; the default run takes {format_bytes(int(needed))}"
    return Finding(_AREA, name, MISSING, found, remedy)
