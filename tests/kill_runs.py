"""Kill a run at random moments, start it again each time, compare it with an uninterrupted one.

    python tests/kill_runs.py BASE FOLDER NUM_KILLS [SEED]

Prints one JSON line. Each run is a fork of this process, which has imported everything: a start
takes no longer than its work, so that the moments are spread over all stages.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from pipeline_cases import settings, write_data
from safetensors.torch import load_file

from qatlora import pipeline
from qatlora.config import RootConfig
from qatlora.files import sha256_of_file
from qatlora.llamacpp.gguf_read import read_gguf

NUM_STEPS = 24
READERS = {
    ".json": lambda path: json.loads(path.read_text("utf-8")),
    ".jsonl": lambda path: [json.loads(line) for line in path.read_text("utf-8").splitlines()],
    ".safetensors": load_file,
    ".gguf": read_gguf,
    ".pt": torch.load,
    ".png": lambda path: path.read_bytes().index(b"IEND"),
}
COMPARED = ("adapter/adapter_model.safetensors", "adapter/identity.json", "*.gguf")


def start(cfg: RootConfig) -> int:
    """Run the pipeline in a fork; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            pipeline.run(cfg)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def finish(cfg: RootConfig) -> float:
    """Run to the end; seconds."""
    begin = time.monotonic()
    _, status = os.waitpid(start(cfg), 0)
    assert status == 0, f"the run in {cfg.run_dir} failed"
    return time.monotonic() - begin


def kill_after(cfg: RootConfig, seconds: float, *, in_training: bool) -> bool:
    """Kill after these seconds of a run, or of its training; True if it was still at work then."""
    log = Path(cfg.run_dir) / "train_log.jsonl"
    earlier = last_change(log)
    pid = start(cfg)
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        if in_training and last_change(log) == earlier:
            begin = time.monotonic()
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"a resumed run in {cfg.run_dir} failed"
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def last_change(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def require_whole(run_dir: Path) -> str:
    """Every file at a final path can be read to its end; the furthest trace that the run left."""
    paths = [path.relative_to(run_dir) for path in sorted(run_dir.rglob("*"))]
    final = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    for path in final:
        READERS.get(path.suffix, lambda _: None)(run_dir / path)
    checkpoints = [path for path in final if path.name.startswith("checkpoint-")]
    assert all((run_dir / path / "trainer_state.json").is_file() for path in checkpoints)
    traces = {
        "published": "*.gguf",
        "candidate": ".candidate",
        "adapter": "adapter",
        "checkpoint": "checkpoints/checkpoint-*",
        "training": "train_log.jsonl",
    }
    return next((name for name, glob in traces.items() if any(run_dir.glob(glob))), "before")


def outcome(run_dir: Path) -> dict[str, object]:
    """Digests of what was trained and published, and the losses."""
    lines = (run_dir / "train_log.jsonl").read_text("utf-8").splitlines()
    files = [path for glob in COMPARED for path in sorted(run_dir.glob(glob))]
    return {
        "losses": [json.loads(line)["loss"] for line in lines],
        "digests": {path.name: sha256_of_file(path) for path in files},
    }


def main(base: Path, folder: Path, num_kills: int, seed: int) -> None:
    """Kill `num_kills` times, every other time in training; a run that ends is compared."""
    torch.set_num_threads(1)
    data = write_data(folder)
    moments = random.Random(seed)

    def course(name: str) -> RootConfig:
        cfg = settings(base, data, folder / name)
        cfg.train.max_steps, cfg.train.resume = NUM_STEPS, True
        return cfg

    seconds = finish(course("whole"))
    report = json.loads((folder / "whole" / "report.json").read_text("utf-8"))
    wanted = outcome(folder / "whole")
    assert len(wanted["losses"]) == NUM_STEPS
    found: Counter[str] = Counter()
    number = number_of_starts = 0
    while found.total() < num_kills:
        cfg = course(f"killed-{number}")
        in_training = number_of_starts % 2 == 0
        longest = report["train"]["seconds"] if in_training else seconds
        if kill_after(cfg, moments.uniform(0, longest), in_training=in_training):
            found[require_whole(Path(cfg.run_dir))] += 1
        else:
            assert outcome(Path(cfg.run_dir)) == wanted
            number += 1
        number_of_starts += 1
    last = course(f"killed-{number}")
    finish(last)
    assert outcome(Path(last.run_dir)) == wanted
    print(json.dumps({"kills": found.total(), "at": found, "runs": number + 1}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(*sys.argv[4:5] or [0]))
