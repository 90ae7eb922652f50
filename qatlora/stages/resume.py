"""Going on with a killed run: only as the same run, and never over it unasked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qatlora import progress
from qatlora.errors import ConfigError, RunFolderError
from qatlora.state import Run
from qatlora.train.checkpoints import last_checkpoint

SETTINGS = "config.json"
"""The resolved settings in a run folder."""

_COURSE = ("seed", "base", "storage", "adapter", "data", "teacher", "distill", "train", "export")
"""What decides the course of training; a resumed run keeps it."""

_OF_EXPORT = "export.other_type"
"""The one key of its section: the embeddings are rounded to it before training."""

_FREE = {"data.num_prompts", "teacher.cache_path"} | {
    f"train.{key}"
    for key in (
        "resume",
        "save_steps",
        "eval_steps",
        "device",
        "keep_blocks",
        "gradient_checkpointing",
        "micro_batch_rows",
    )
}
"""What changes its speed and memory, at most its rounding, or nothing of it."""


def check_run_folder(state: Run, settings: dict[str, Any]) -> None:
    """Before the folder gets the settings of this run, compare them with those of an earlier one.

    Raises:
        RunFolderError: the folder is another recipe's or no run's, or an earlier run has
            checkpoints here, and nothing is said of going on.
        ConfigError: it was another course of training.
    """
    _require_same_recipe(state.run_dir / SETTINGS, settings)
    if "train" not in state.cfg.stages:
        return
    run_dir, resume = state.run_dir, state.cfg.train.resume
    last = last_checkpoint(run_dir)
    if last is None:
        if resume:
            progress.say(f"{run_dir} holds no checkpoint to go on from: training starts anew.")
    elif resume:
        _require_same_course(run_dir / SETTINGS, settings)
        progress.say(f"Going on from {last}.")
    else:
        raise RunFolderError(
            f"{run_dir} holds the run that wrote {last.name}, and a second one would overwrite it. "
            "Go on with it by train.resume=true, or set run_dir to another folder."
        )


def _require_same_recipe(path: Path, settings: dict[str, Any]) -> None:
    """A folder's settings are what a resumed run is compared with: no other kind replaces them."""
    if not path.is_file():
        return
    earlier, now = _kind(json.loads(path.read_text("utf-8"))), _kind(settings)
    if earlier != now:
        raise RunFolderError(
            f"{path} is of {earlier}, and a folder holds runs of one recipe: {now} would overwrite "
            "these settings. Set run_dir to another folder."
        )


def _kind(settings: dict[str, Any]) -> str:
    """What a run is, for its folder: two runs of one kind may follow each other there."""
    if "stages" not in settings or "card" not in settings:
        return "no run of qatlora"
    how = "with" if "train" in settings["stages"] else "without"
    return f"recipe={settings['card']['name']} {how} training"


def _require_same_course(path: Path, settings: dict[str, Any]) -> None:
    if not path.is_file():
        return
    earlier, now = dict(_course(json.loads(path.read_text("utf-8")))), dict(_course(settings))
    for key in sorted(earlier.keys() & now.keys()):
        if earlier[key] != now[key]:
            raise ConfigError(
                f"{key}={now[key]}: the run in {path.parent} that is to be resumed has "
                f"{earlier[key]}, and one course of training has one value. Give that, or start "
                "anew in another run_dir."
            )


def _course(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Key in dotted form and value of each setting that a resumed run keeps."""
    for section in _COURSE:
        value = settings.get(section)
        for key, one in value.items() if isinstance(value, dict) else [("", value)]:
            name = f"{section}.{key}".rstrip(".")
            if name not in _FREE and (section != "export" or name == _OF_EXPORT):
                yield name, one
