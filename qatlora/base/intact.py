"""Whether the files of a checkpoint are those that were written, and lie where they should.

Folders of ours carry sums (`qatlora.files.SUMS`); others are taken as they are. Why so:
docs/decisions/0014-a-folder-knows-its-sums.md.
"""

import functools
import json
from collections.abc import Callable, Collection
from pathlib import Path

from qatlora.errors import CheckpointError
from qatlora.files import SUMS, broken_sum

WEIGHTS = ".safetensors"


def require_sum(path: Path) -> None:
    """Compare a weight file with the sums of its folder, if it has any; once per process.

    Raises:
        CheckpointError: they differ.
    """
    status = path.stat()
    _require_sum(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _require_sum(path: Path, size: int, mtime_ns: int) -> None:
    """Of the file as it is now: a changed one is looked at again."""
    require_sums(path.parent, lambda name: name == path.name)


def require_sums(folder: Path, wanted: Callable[[str], bool]) -> None:
    """Compare files of a folder with its sums, if it has any.

    Raises:
        CheckpointError: they differ.
    """
    if problem := broken_sum(folder, wanted):
        raise CheckpointError(
            f"{problem}: the file was damaged or edited. Copy or build the folder again; if the "
            f"edit is meant, remove the file's line from {SUMS}."
        )


def check_index(folder: Path) -> None:
    """An index says which files transformers opens: only weights in the folder itself.

    Raises:
        CheckpointError: it names another file, or one that is absent.
    """
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    try:
        named = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        wrong = [name for name in named if not _is_weight_file(folder, name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CheckpointError(
            f"{path} is no index of weights ({type(problem).__name__}: {problem}). It is damaged: "
            "fetch it again."
        ) from None
    if wrong:
        raise CheckpointError(
            f"{path} names {sorted(map(str, wrong))[0]!r}, and an index may only name safetensors "
            f"files that lie in {folder} itself. Fetch the checkpoint again, whole."
        )


def _is_weight_file(folder: Path, name: str) -> bool:
    return Path(name).name == name and name.endswith(WEIGHTS) and (folder / name).is_file()


def require_all_found(folder: Path, missing: Collection[str]) -> None:
    """Refuse a checkpoint that is not whole, found before or after it was loaded.

    Raises:
        CheckpointError: there are names in `missing`.
    """
    if missing:
        names = ", ".join(sorted(path.name for path in folder.glob(f"*{WEIGHTS}")))
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors that its config.json calls for, the first is "
            f"'{min(missing)}', and transformers would go on with random ones. A file ({names}) is "
            "incomplete or belongs to another model: fetch the checkpoint again."
        )
