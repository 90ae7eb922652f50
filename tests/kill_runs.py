"""Kill a run at random moments, start it again each time, compare it with an uninterrupted one.

    python tests/kill_runs.py BASE FOLDER NUM_KILLS [TARGET ...]

Kills each target of `kill_targets.TARGETS`, or those that are named, NUM_KILLS times, and prints
one JSON line for it; on stderr it counts. Each run is a fork of this process, which has imported
everything: a start takes no longer than its work, so that the moments are spread over all stages.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from kill_targets import TARGETS, Case, Target
from safetensors.torch import load_file

from qatlora.files import SUMS, broken_sum
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.llamacpp.source import check_converter

READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text("utf-8")),
    ".jsonl": lambda path: [json.loads(line) for line in path.read_text("utf-8").splitlines()],
    ".safetensors": load_file,
    ".gguf": read_gguf,
    ".pt": torch.load,
    ".png": lambda path: path.read_bytes().index(b"IEND"),
}


class Watched(NamedTuple):
    """A start: whether it was killed, and the seconds until its end and in its long part."""

    killed: bool
    seconds: float
    seconds_at_work: float


class Runner(NamedTuple):
    """Starts one target in run folders."""

    target: Target
    case: Case

    @property
    def last_trace(self) -> str:
        """What a run that has done everything has left, even where the kill came before its end."""
        return next(iter(self.target.traces))

    def start(self, run_dir: Path) -> int:
        """Run in a fork; its process id."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self.target.run(self.case, run_dir)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        return pid

    def watch(self, run_dir: Path, limit: float, *, at_work: bool = False) -> Watched:
        """Start, and kill after `limit` seconds of the run, or of its long part."""
        earlier = last_change(run_dir, self.target.work)
        pid = self.start(run_dir)
        begin = time.monotonic()
        work_began = None
        while True:
            now = time.monotonic()
            if work_began is None and last_change(run_dir, self.target.work) > earlier:
                work_began = now
            since = work_began if at_work else begin
            if since is not None and now > since + limit:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.001)
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0, f"a run in {run_dir} failed"
        return Watched(killed, now - begin, now - (work_began or now))

    def require_whole(self, run_dir: Path) -> str:
        """Every file at a final path is whole, as its folder's sums say; the furthest trace."""
        paths = [path.relative_to(run_dir) for path in sorted(run_dir.rglob("*"))]
        final = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
        for path in final:
            READERS.get(path.suffix, lambda _: None)(run_dir / path)
            if path.name == SUMS:
                assert broken_sum((run_dir / path).parent) is None
        checkpoints = [path for path in final if path.name.startswith("checkpoint-")]
        assert all((run_dir / path / "trainer_state.json").is_file() for path in checkpoints)
        found = (name for name, one in self.target.traces.items() if any(run_dir.glob(one)))
        return next(found, "before")


def last_change(run_dir: Path, pattern: str) -> int:
    """When the newest of the files was written, 0 where there is none."""
    found = [0]
    for path in run_dir.glob(pattern):
        try:
            found.append(path.stat().st_mtime_ns)
        except FileNotFoundError:  # the run has just renamed it
            continue
    return max(found)


def kill(runner: Runner, folder: Path, num_kills: int) -> Counter[str]:
    """Kill `num_kills` times, every other time in the long part; a run that ends is compared.

    Returns:
        The furthest trace that a killed run had left -> how often it was that one.
    """
    moments = random.Random(0)
    whole = runner.watch(folder / "whole", float("inf"))
    wanted = runner.target.outcome(folder / "whole")
    assert wanted
    found: Counter[str] = Counter()
    number = number_of_starts = 0
    while found.total() < num_kills:
        run_dir = folder / f"killed-{number}"
        at_work = number_of_starts % 2 == 0
        longest = whole.seconds_at_work if at_work else whole.seconds
        fresh = not run_dir.exists()
        watched = runner.watch(run_dir, moments.uniform(0, longest), at_work=at_work)
        reached = runner.require_whole(run_dir)
        if watched.killed:
            found[reached] += 1
            print(f"{found.total()}: {run_dir} {watched.seconds:.1f} s, {reached}", file=sys.stderr)
        elif fresh:  # not killed at all: other jobs may have slowed the first one down
            whole = watched
        if not watched.killed or reached == runner.last_trace:
            assert runner.target.outcome(run_dir) == wanted
            number += 1
        number_of_starts += 1
    runner.watch(folder / f"killed-{number}", float("inf"))
    assert runner.target.outcome(folder / f"killed-{number}") == wanted
    return found


def main(base: Path, folder: Path, num_kills: int, names: list[str]) -> None:
    """Kill the targets one after the other."""
    torch.set_num_threads(1)
    check_converter()  # its answer is kept, so that no start waits for it
    case = Case.make(base, folder)
    for name in names or TARGETS:
        found = kill(Runner(TARGETS[name], case), folder / name, num_kills)
        print(json.dumps({"target": name, "kills": found.total(), "at": found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
