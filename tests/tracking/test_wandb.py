"""wandb without a key, without a network, without a terminal: offline, and soon over."""

import json
import socket
import time
from pathlib import Path

import pytest
from pipeline_cases import STAGES, settings, write_data

from qatlora import pipeline
from qatlora.config import LoggingConfig, ReportTo
from qatlora.report.results import TrainPoint
from qatlora.tracking import open_tracker
from qatlora.tracking.wandb_login import has_key, why_offline

KEY = "0123456789abcdef0123456789abcdef01234567"
LONGEST_WAIT_SECONDS = 8.0


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A home without keys, an environment without settings of wandb or proxies."""
    for name in ("API_KEY", "MODE", "BASE_URL", "DIR", "PROJECT", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


@pytest.mark.slow
def test_a_run_without_key_ends_offline_with_its_tables_and_plots(
    nobody: pytest.MonkeyPatch, tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    cfg = settings(tiny_gemma3_folder, write_data(tmp_path), run_dir)
    cfg.stages = [*STAGES[: STAGES.index("train") + 1], "evaluate_trained", "report"]
    cfg.logging.report_to = ReportTo.wandb
    pipeline.run(cfg)
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    assert list(offline.glob("run-*.wandb"))
    media = {path.name.partition("_")[0] for path in (offline / "files" / "media").rglob("*.*")}
    assert {"scores", "gates", "loss"} <= media
    (scores,) = (offline / "files" / "media" / "table").glob("scores*.json")
    table = json.loads(scores.read_text(encoding="utf-8"))
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    perplexities = {(row[0], row[1]): row[3] for row in table["data"]}
    assert perplexities["task", "trained"] == report["perplexity"]["task"]["trained"]


def test_a_resumed_run_goes_on_under_its_id_and_a_new_one_does_not(
    nobody: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = []
    for last_step in (0, 2, 0):
        settings = LoggingConfig(report_to=ReportTo.wandb)
        tracker = open_tracker(settings, tmp_path, {}, last_step)
        tracker.log(TrainPoint(last_step + 1, 2.0, None, None, None, 1e-3, 0.5))
        tracker.close(failed=False)
        newest = max(
            (tmp_path / "wandb").glob("offline-run-*"), key=lambda one: one.stat().st_ctime
        )
        ids.append(newest.name.split("-")[3])  # a number follows within the same second
    assert ids[0] == ids[1] != ids[2]


def test_a_server_that_does_not_answer_is_given_up_soon(nobody: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:  # bound, but nobody listens
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        nobody.setenv("WANDB_BASE_URL", url)
        nobody.setenv("WANDB_API_KEY", KEY)
        start = time.monotonic()
        assert why_offline() == f"{url} does not answer"
        assert time.monotonic() - start < LONGEST_WAIT_SECONDS


def test_a_server_that_answers_gets_the_run(nobody: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        nobody.setenv("WANDB_API_KEY", KEY)
        assert why_offline() is None
        nobody.setenv("WANDB_MODE", "offline")
        assert why_offline() == "WANDB_MODE=offline"


def test_online_without_a_key_stays_offline_instead_of_asking(nobody: pytest.MonkeyPatch) -> None:
    nobody.setenv("WANDB_MODE", "online")
    reason = why_offline()
    assert reason is not None
    assert "wandb login" in reason


def test_a_key_is_found_where_wandb_login_stores_it(
    nobody: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not has_key()
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert has_key()
    nobody.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login")
    assert not has_key()
