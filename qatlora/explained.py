"""What goes wrong on purpose, as one paragraph and an exit code; a bug keeps its traceback."""

import errno
import re
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from qatlora.config import RootConfig
from qatlora.errors import ConfigError, QatloraError, closest

_ENVIRONMENT_ERRNOS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
)  # fmt: skip


def explain(error: Exception) -> tuple[str, int] | None:
    """Message of one paragraph and exit code, or None where only a traceback will do."""
    if isinstance(error, QatloraError):
        return _one_paragraph(str(error)), error.exit_code
    if isinstance(error, HydraException):
        return _explain_composition(error), ConfigError.exit_code
    if isinstance(error, FileExistsError | NotADirectoryError) and _is_no_folder(error):
        return (
            f"{error.filename} is a file, or lies below one, and a folder is to be made there. "
            "Give another place with run_dir=FOLDER or QATLORA_CACHE=FOLDER."
        ), QatloraError.exit_code
    if _errno_of(error) in _ENVIRONMENT_ERRNOS:
        return (
            f"{error}. Free some space or grant access, or write elsewhere with run_dir=FOLDER "
            "and QATLORA_CACHE=FOLDER."
        ), QatloraError.exit_code
    return None


def _is_no_folder(error: OSError) -> bool:
    return error.filename is not None and not Path(error.filename).is_dir()


def _errno_of(error: Exception) -> int | None:
    """What the system refused; safetensors says it in its message alone."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _explain_composition(error: HydraException) -> str:
    """What Hydra could not compose: the key, what it may be, and the nearest of that."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: no such {group}; {closest(choice, error.options)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} is not understood: settings are given as KEY=VALUE. Quote a value "
            "that holds commas or brackets, as in 'run_dir=\"my,run\"'."
        )
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        parent, _, key = cause.full_key.rpartition(".")
        section = f" in {parent}" if parent else ""
        choices = closest(key, _keys_of(parent))
        return f"{cause.full_key}: there is no setting {key!r}{section}; {choices}"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        problem = _one_paragraph(str(cause.msg or cause).splitlines()[0])
        return (
            f"{cause.full_key}: {problem}. Give a value of that kind; --cfg job shows the settings "
            "with their values."
        )
    return _one_paragraph(str(error))


def _keys_of(parent: str) -> list[str]:
    schema = OmegaConf.structured(RootConfig)
    node = OmegaConf.select(schema, parent) if parent else schema
    return [str(key) for key in node] + ([] if parent else ["recipe"])


def _one_paragraph(text: str) -> str:
    return " ".join(text.split())
