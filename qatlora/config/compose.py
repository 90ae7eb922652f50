"""From what Hydra composed to plain dataclasses: paths settled, the base decided."""

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qatlora.config.run import BaseConfig
from qatlora.config.schema import RootConfig
from qatlora.errors import ConfigError, first_line
from qatlora.paths import shipped, user_path


def to_dataclasses(cfg: DictConfig) -> RootConfig:
    """Resolve the composed config into dataclass objects.

    Paths become absolute (read from the current folder, `~` expanded), and it is settled which base
    is meant.

    Raises:
        ConfigError: A key was added that the schema does not have, or an interpolation fails.
    """
    _refuse_added_keys(cfg, OmegaConf.structured(RootConfig))
    try:
        root = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        reason = first_line(error)
        raise ConfigError(f"{error.full_key}: {reason}. Set {error.full_key}=VALUE.") from error
    if not isinstance(root, RootConfig):
        raise TypeError(f"composed from {type(root).__name__}, not from RootConfig")
    _settle_paths(root)
    settle_base(root.base)
    return root


def _refuse_added_keys(cfg: DictConfig, schema: DictConfig, prefix: str = "") -> None:
    """`+key=value` opens even a typed config, and nobody would read the key."""
    for key in map(str, cfg):
        if key not in schema:
            raise ConfigError(
                f"{prefix}{key}: there is no such setting, and none can be added. Leave it out; "
                f"the settings here are {', '.join(map(str, schema))}."
            )
        if OmegaConf.is_dict(schema[key]) and len(schema[key]):  # empty: keys are the user's own
            _refuse_added_keys(cfg[key], schema[key], f"{prefix}{key}.")


_PATHS = (
    "base.path",
    "adapter.path",
    "data.path",
    "teacher.path",
    "teacher.cache_path",
    "build.path",
    "inspect.against",
    "validate.merged",
    "validate.adapter",
    "validate.gguf",
    "patch.path",
    "patch.base",
)


def _settle_paths(root: RootConfig) -> None:
    for key in _PATHS:
        section, _, name = key.partition(".")
        if (text := getattr(getattr(root, section), name)) is not None:
            setattr(getattr(root, section), name, str(user_path(key, text).absolute()))
    root.data.paths = [str(user_path("data.paths", path).absolute()) for path in root.data.paths]


# Templates of embedded bases that have none; a displaced base must not leave one behind.
_EMBEDDED_TEMPLATES = {"gemma3_270m": "gemma3"}


def settle_base(base: BaseConfig) -> None:
    """Let a path or hub id displace an embedded or published base, and name what has no name."""
    if base.architecture and (base.path or base.hub_id != _published_hub_id(base.name)):
        base.hub_id = None if base.path else base.hub_id
        base.architecture = base.name = None
    if base.path or base.hub_id:
        if base.name == base.embedded:
            base.name = None
        base.embedded = None
    elif base.embedded and base.chat_template is None:
        base.chat_template = _EMBEDDED_TEMPLATES.get(base.embedded)
    if base.name is None:
        source = base.embedded or base.path or base.hub_id or "base"
        base.name = re.sub(r"\.gguf$", "", Path(source).name, flags=re.IGNORECASE)


def _published_hub_id(name: str | None) -> str | None:
    """The hub id in the file of conf/base that has this name; None without such a file."""
    path = shipped("conf") / "base" / f"{name}.yaml"
    return OmegaConf.load(path).get("hub_id") if path.is_file() else None
