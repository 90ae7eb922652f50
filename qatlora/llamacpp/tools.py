"""llama.cpp's programs: built once from the pinned source, then run as judges of finished files.

    python -m qatlora.llamacpp.tools install

Every program runs with LLAMA_ARG_REPACK=0: weights stay as the file has them. It makes figures of
different machines comparable, and on some virtual machines llama.cpp's AMX kernels, which belong
to the same switch, crash although the processor announces them. And with OMP_WAIT_POLICY=passive:
threads that wait actively make a run many times slower where other programs want the same cores.
"""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from qatlora import files
from qatlora.errors import QatloraError, ToolError
from qatlora.llamacpp.source import llama_cpp_source, llama_cpp_version
from qatlora.paths import cache_folder

TOOLS_VARIABLE = "QATLORA_LLAMA_CPP_BIN"
TOOLS = (
    "llama-quantize",
    "llama-perplexity",
    "llama-imatrix",
    "llama-tokenize",
    "llama-completion",
)
INSTALL = "python -m qatlora.llamacpp.tools install"
_SUFFIX = ".exe" if os.name == "nt" else ""
_LOG_TAIL_LINES = 8
_MIN_ATTEMPTS, _MAX_ATTEMPTS, _SECONDS_OF_ATTEMPTS = 2, 200, 120
_CONFIGURE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_PROGRESS_MARK = re.compile(r"\[\s*(\d+)%\]|\[(\d+)/(\d+)\]")  # of make; of ninja
_END_OF_TEXT = " [end of text]"


def find_tool(name: str) -> Path | None:
    """Path of a program, or None; the folder QATLORA_LLAMA_CPP_BIN goes before our own build."""
    chosen = os.environ.get(TOOLS_VARIABLE)
    folder = Path(chosen).expanduser() if chosen else _bin_folder()
    path = folder / f"{name}{_SUFFIX}"
    return path if path.is_file() else None


def require_tool(name: str) -> Path:
    """Path of a program.

    Raises:
        ToolError: it is not there.
    """
    path = find_tool(name)
    if path is None:
        raise ToolError(
            f"{name} is not there: build llama.cpp's tools with `{INSTALL}`, or set "
            f"{TOOLS_VARIABLE} to a folder that has it."
        )
    return path


def install() -> Path:
    """Build the five programs with cmake (about 7 minutes on two cores); returns their folder.

    Raises:
        ToolError: no cmake or compiler, the source cannot be had, or the build failed.
    """
    target = _bin_folder()
    if all((target / f"{name}{_SUFFIX}").is_file() for name in TOOLS):
        return target
    if shutil.which("cmake") is None:
        raise ToolError(
            "cmake is not on the PATH, so llama.cpp's tools cannot be built: install cmake and a "
            f"C++ compiler, or set {TOOLS_VARIABLE} to a folder with {', '.join(TOOLS)}."
        )
    source = llama_cpp_source()
    target.parent.mkdir(parents=True, exist_ok=True)
    log = target.parent / "build.log"
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as build:
        for command in build_commands(source, Path(build)):
            _run_build(command, log)
        with files.replacing_folder(target) as folder:
            for name in TOOLS:
                built = next(Path(build).glob(f"bin/**/{name}{_SUFFIX}"))
                shutil.copy2(built, folder / built.name)
    return target


def build_commands(source: Path, build: Path) -> list[list[str]]:
    """The configure and the build step of cmake, for static programs without server and network."""
    configure = ["cmake", "-S", str(source), "-B", str(build), *_CONFIGURE_OPTIONS]
    if platform.machine() in ("x86_64", "AMD64") and os.name != "nt":
        # An explicit -mno- wins over the -march=native that ggml adds.
        configure += [f"-DCMAKE_C_FLAGS={_NO_AMX}", f"-DCMAKE_CXX_FLAGS={_NO_AMX}"]
    num_jobs = str(os.cpu_count() or 2)
    compile_step = ["cmake", "--build", str(build), "--config", "Release", "--parallel", num_jobs]
    return [configure, [*compile_step, "--target", *TOOLS]]


def tokenize(gguf: Path, text: str, add_bos: bool = True) -> list[int]:
    """Token ids that llama.cpp gives to `text`; the names of control tokens become those tokens.

    Raises:
        ToolError: the program is missing or failed.
    """
    options = ["--stdin", "--ids", *([] if add_bos else ["--no-bos"])]
    output = run_tool("llama-tokenize", ["-m", str(gguf), *options], timeout=300, stdin=text)
    ids: list[int] = ast.literal_eval(output.strip().splitlines()[-1])
    return ids


def generate(gguf: Path, user: str, max_tokens: int, system: str = "") -> str:
    """Greedy answer to one user message, through the file's own chat template.

    Raises:
        ToolError: the program is missing or failed.
    """
    options = ["--jinja", "-cnv", "-st", *(["-sys", system] if system else [])]
    return _complete(gguf, user, max_tokens, options)


def complete(gguf: Path, prompt: str, max_tokens: int) -> str:
    """Greedy continuation of raw text, without any template.

    Raises:
        ToolError: the program is missing or failed.
    """
    return _complete(gguf, prompt, max_tokens, ["-no-cnv"])


def quantize(gguf: Path, target: Path, other_type: str) -> None:
    """Write `target` as llama-quantize's Q4_0, embeddings and output as `other_type` (q8_0, ...).

    Raises:
        ToolError: the program is missing or failed.
    """
    types = ["--token-embedding-type", other_type, "--output-tensor-type", other_type]
    run_tool("llama-quantize", [*types, str(gguf), str(target), "Q4_0"], timeout=7200)


def convert_types(gguf: Path, target: Path, kind: str) -> None:
    """Write `target` with every matrix as `kind` (F32, BF16, ...), decoded from what it is.

    Raises:
        ToolError: the program is missing or failed.
    """
    run_tool("llama-quantize", ["--allow-requantize", str(gguf), str(target), kind], timeout=7200)


def _complete(gguf: Path, prompt: str, max_tokens: int, options: list[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="qatlora-prompt-") as scratch:
        prompt_file = Path(scratch) / "prompt.txt"
        # The program takes one line break off the end of the file.
        prompt_file.write_text(prompt + "\n", encoding="utf-8")
        fixed = ["--temp", "0", "--no-warmup", "--no-display-prompt", "--simple-io"]
        output = run_tool(
            "llama-completion",
            ["-m", str(gguf), "-f", str(prompt_file), "-n", str(max_tokens), *options, *fixed],
            timeout=1800,
        )
    return output.rstrip().removesuffix(_END_OF_TEXT)


def run_until(name: str, arguments: list[str], timeout: float, wanted: re.Pattern[str]) -> str:
    """Run a program until its log has the line that it ends with.

    llama.cpp writes its log in a thread and does not wait for it at exit, so that the last lines
    of a short run may be missing. A run that has failed for good is repeated in vain: look into
    the log that is returned.

    Raises:
        ToolError: as `run_tool`.
    """
    start = time.monotonic()
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        output = run_tool(name, arguments, timeout, keep_errors=True)
        in_time = time.monotonic() - start < _SECONDS_OF_ATTEMPTS or attempt < _MIN_ATTEMPTS
        if wanted.search(output) or not in_time:
            break
    return output


def run_tool(
    name: str, arguments: list[str], timeout: float, stdin: str = "", keep_errors: bool = False
) -> str:
    """What a program prints on stdout, with `keep_errors` also on stderr.

    Raises:
        ToolError: the program is missing, failed, or took longer than `timeout` seconds.
    """
    path = require_tool(name)
    try:
        run = subprocess.run(
            [str(path), *arguments],
            env={"OMP_WAIT_POLICY": "passive"} | os.environ | {"LLAMA_ARG_REPACK": "0"},
            input=stdin.encode(),
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ToolError(
            f"{name} did not finish within {timeout:.0f} s; give it a smaller task or more threads."
        ) from None
    errors = run.stderr.decode(errors="replace")
    if run.returncode != 0:
        raise ToolError(
            f"{name} failed with exit code {run.returncode} on {' '.join(arguments)}: "
            f"{tail(errors)}. If it is another version, build the pinned one with `{INSTALL}`."
        )
    output = run.stdout.decode(errors="replace")
    return output + errors if keep_errors else output


def _bin_folder() -> Path:
    return cache_folder() / "llama.cpp" / llama_cpp_version() / "bin"


def _run_build(command: list[str], log: Path) -> None:
    columns = (
        TextColumn("llama.cpp tools"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    lines = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    with process, Progress(*columns) as progress:
        task = progress.add_task("build", total=1.0)
        for line in process.stdout:
            lines.append(line)
            if mark := _PROGRESS_MARK.search(line):
                share = int(mark[1]) / 100 if mark[1] else int(mark[2]) / int(mark[3])
                progress.update(task, completed=share)
    files.write_text(log, "".join(lines))
    if process.returncode != 0:
        raise ToolError(
            f"`{' '.join(command[:4])} ...` failed (its log: {log}): {tail(''.join(lines))}. A "
            "C++17 compiler is needed; or set "
            f"{TOOLS_VARIABLE} to a folder with {', '.join(TOOLS)}."
        )


def tail(text: str) -> str:
    """The last lines of a log, on one line."""
    return " | ".join(text.strip().splitlines()[-_LOG_TAIL_LINES:])


def main(arguments: list[str]) -> int:
    """Entry point of `python -m qatlora.llamacpp.tools`."""
    if arguments != ["install"]:
        print(f"usage: {INSTALL}", file=sys.stderr)
        return 2
    try:
        print(install())
    except QatloraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
