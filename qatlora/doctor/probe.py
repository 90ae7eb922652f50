"""A process of its own that imports torch and says what it finds, as JSON on stdout.

A broken driver or library may crash or hang at its import: then only this process does.
"""

import importlib
import json
from typing import Any

import torch


def probe() -> dict[str, Any]:
    """Threads, bf16 on the CPU, GPUs, and why bitsandbytes cannot be imported, if it cannot."""
    cpu = torch.cpu.get_capabilities()
    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        gpus.append(
            {
                "name": properties.name,
                "bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "bf16": properties.major >= 8,  # in hardware, from Ampere on
            }
        )
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu.get("cpu_name", "CPU"),
        "cpu_bf16": [name for name in ("amx_bf16", "avx512_bf16", "sve_bf16") if cpu.get(name)],
        "gpus": gpus,
        "bitsandbytes": _why_not("bitsandbytes"),
    }


def _why_not(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return None


if __name__ == "__main__":
    print(json.dumps(probe()))
