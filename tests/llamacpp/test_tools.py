import platform
import re
import stat
from pathlib import Path

import pytest

from qatlora.errors import ToolError
from qatlora.llamacpp import tools
from qatlora.llamacpp.perplexity import perplexity


@pytest.fixture
def fake_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tools.TOOLS_VARIABLE, str(tmp_path))
    return tmp_path


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_chosen_folder_goes_before_the_cache(fake_tools: Path):
    assert tools.find_tool("llama-quantize") is None
    write_program(fake_tools / "llama-quantize", "exit 0")
    assert tools.find_tool("llama-quantize") == fake_tools / "llama-quantize"


def test_without_a_choice_the_cache_folder_of_the_pinned_version_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(tools.TOOLS_VARIABLE, raising=False)
    monkeypatch.setenv("QATLORA_CACHE", str(tmp_path))
    folder = tmp_path / "llama.cpp" / "0.3.36" / "bin"
    folder.mkdir(parents=True)
    write_program(folder / "llama-tokenize", "exit 0")
    assert tools.find_tool("llama-tokenize") == folder / "llama-tokenize"


def test_a_missing_program_is_reported_with_the_command_that_builds_it(fake_tools: Path):
    with pytest.raises(ToolError, match=r"llamacpp\.tools install"):
        tools.tokenize(Path("model.gguf"), "text")


def test_a_failing_program_is_reported_with_the_end_of_what_it_said(fake_tools: Path):
    write_program(fake_tools / "llama-tokenize", "echo first >&2; echo no such model >&2; exit 3")
    with pytest.raises(ToolError, match=r"exit code 3 .*no such model"):
        tools.tokenize(Path("model.gguf"), "text")


def test_programs_read_the_text_as_it_is_and_keep_weights_unpacked(fake_tools: Path):
    write_program(
        fake_tools / "llama-tokenize",
        'test "$LLAMA_ARG_REPACK" = 0 || exit 9; echo "[$(wc -c)]"',
    )
    assert tools.tokenize(Path("model.gguf"), "é\n\n") == [4]


def test_the_estimate_of_perplexity_is_read_from_the_log(
    fake_tools: Path, monkeypatch: pytest.MonkeyPatch
):
    write_program(
        fake_tools / "llama-perplexity", 'echo "1 I Final estimate: PPL = 13.5663 +/- 2.5" >&2'
    )
    assert perplexity(Path("m.gguf"), Path("t.txt"), 128, 2) == (13.5663, 2.5)
    write_program(fake_tools / "llama-perplexity", "echo too short >&2")
    monkeypatch.setattr(tools, "_MAX_ATTEMPTS", 2)
    with pytest.raises(ToolError, match=r"two windows of 128 tokens.*too short"):
        perplexity(Path("m.gguf"), Path("t.txt"), 128, 2)


def test_a_run_whose_log_lost_its_end_is_repeated(fake_tools: Path):
    script = 'echo run >> "$0.runs"; test $(wc -l < "$0.runs") -lt 3 || echo the end'
    write_program(fake_tools / "llama-perplexity", script)
    output = tools.run_until("llama-perplexity", [], 60, re.compile("the end"))
    assert output == "the end\n"
    assert (fake_tools / "llama-perplexity.runs").read_text().count("run") == 3


def test_the_build_makes_only_the_five_programs_without_server_network_and_amx():
    configure, compile_step = tools.build_commands(Path("source"), Path("build"))
    assert tuple(compile_step[compile_step.index("--target") + 1 :]) == tools.TOOLS
    assert {"-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_OPENSSL=OFF"} <= set(configure)
    on_x86 = platform.machine() == "x86_64"
    assert any("-mno-amx" in option for option in configure) == on_x86


def test_installing_without_cmake_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QATLORA_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="cmake is not on the PATH"):
        tools.install()


def test_the_command_knows_only_install(capsys: pytest.CaptureFixture[str]):
    assert tools.main(["uninstall"]) == 2
    assert "tools install" in capsys.readouterr().err
