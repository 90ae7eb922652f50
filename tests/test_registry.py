import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from qatlora import registry
from qatlora.errors import ToolError


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return path


def make_sdist(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as sources:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            sources.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("pkg-1/vendor/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        sources.addfile(link)
    return path


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> registry.Package:
    """A package whose wheel lies in the cache folder already; pip must not be needed."""
    monkeypatch.setenv("QATLORA_CACHE", str(tmp_path))
    (tmp_path / "packages").mkdir()
    wheel = make_wheel(
        tmp_path / "packages" / "demo-1.0-py3-none-any.whl",
        {"demo/data/a.txt": b"content", "demo/code.py": b"raise SystemExit"},
    )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = registry.Package("demo-package", "1.0", wheel.name, digest, False, "demo/data")
    monkeypatch.setitem(registry.PACKAGES, package.name, package)
    return package


def test_every_package_is_pinned_by_version_file_and_digest():
    for name, package in registry.PACKAGES.items():
        assert package.name == name
        assert package.version in package.filename
        assert len(bytes.fromhex(package.sha256)) == 32
        assert package.filename.endswith(".tar.gz" if package.source else ".whl")


def test_a_file_put_into_the_cache_by_hand_is_unpacked_without_pip(
    demo: registry.Package, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    root = registry.locate(demo.name)
    assert (root / demo.folder / "a.txt").read_bytes() == b"content"
    assert not (root / "demo/code.py").exists()
    assert registry.locate(demo.name) == root


def test_a_file_with_another_digest_is_refused_and_leaves_nothing(demo: registry.Package):
    archive = Path(registry.cache_folder()) / "packages" / demo.filename
    make_wheel(archive, {"demo/data/a.txt": b"tampered"})
    with pytest.raises(ToolError, match=f"{demo.sha256} is pinned"):
        registry.locate(demo.name)
    assert not (archive.parent / "demo-package-1.0").exists()


def test_a_failing_pip_is_reported_with_its_command_and_last_line(
    demo: registry.Package, monkeypatch: pytest.MonkeyPatch
):
    (registry.cache_folder() / "packages" / demo.filename).unlink()
    commands = []

    def no_network(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(ToolError, match=r"demo-package==1\.0.*ERROR: no network.*put demo-1\.0"):
        registry.locate(demo.name)
    assert "--no-deps" in commands[0]


def test_an_installed_distribution_of_the_pinned_version_is_used_in_place(
    demo: registry.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site = tmp_path / "site"
    (site / "demo" / "data").mkdir(parents=True)
    metadata = site / "demo_package-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: demo-package\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(site)
    assert registry.locate(demo.name) == site
    metadata.write_text("Metadata-Version: 2.1\nName: demo-package\nVersion: 0.9\n")
    assert registry.locate(demo.name) != site


def test_a_source_distribution_loses_its_first_folder_and_its_links(tmp_path: Path):
    members = {"pkg-1/vendor/a.c": b"x", "pkg-1/setup.py": b"y"}
    registry.unpack(make_sdist(tmp_path / "pkg-1.tar.gz", members), tmp_path / "out", "vendor")
    unpacked = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")]
    assert sorted(map(str, unpacked)) == ["vendor", "vendor/a.c"]


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "demo/../../evil", "demo\\..\\evil", "C:evil"]
)
def test_no_member_may_leave_the_folder(tmp_path: Path, name: str):
    wheel = make_wheel(tmp_path / "w.whl", {name: b"x"})
    with pytest.raises(ToolError, match="outside of its folder"):
        registry.unpack(wheel, tmp_path / "out", "demo")


def test_an_archive_without_the_wanted_folder_is_refused(tmp_path: Path):
    wheel = make_wheel(tmp_path / "w.whl", {"other/a": b"x"})
    with pytest.raises(ToolError, match="no files below 'demo'"):
        registry.unpack(wheel, tmp_path / "out", "demo")
