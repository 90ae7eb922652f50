"""Configurations of published checkpoints at their true size, to count and plan without them.

Each file names the place in the source of transformers that its figures were taken from; tokenizer
and weights are those of the checkpoint on the hub.
"""

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from qatlora.errors import CheckpointError

_FOLDER = Path(__file__).parent


def published_names() -> tuple[str, ...]:
    """Names that `published_config` knows."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def published_config(name: str) -> PreTrainedConfig:
    """The configuration of an architecture, for instance "gemma4_31b".

    Raises:
        CheckpointError: there is none of that name.
    """
    if name not in published_names():
        raise CheckpointError(
            f"base.architecture={name}: no configuration of that name is shipped. Use one of "
            f"{', '.join(published_names())}, or give base.path=FOLDER with a config.json."
        )
    values = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))["config"]
    return AutoConfig.for_model(**values)
