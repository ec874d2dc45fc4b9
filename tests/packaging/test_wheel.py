"""What is installed is what is tracked: no file lost to the symlinked layout, none smuggled in."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGED_SUFFIXES = {".py", ".pyi", ".typed", ".toml"}


def _tracked_package_files() -> set[str]:
    """Wheel paths of all tracked files that belong to a package of src/kvrelay."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    package_roots = {"src/kvrelay": "kvrelay"}
    for link in (REPOSITORY / "src" / "kvrelay").iterdir():
        if link.is_symlink():
            target = link.resolve().relative_to(REPOSITORY).as_posix()
            package_roots[target] = f"kvrelay/{link.name}"
    found = set()
    for name in listed:
        for root, package in package_roots.items():
            path = REPOSITORY / name
            if name.startswith(root + "/") and path.suffix in PACKAGED_SUFFIXES and path.is_file():
                found.add(package + name[len(root) :])
    return found


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    present = "\0".join(n for n in files.split("\0") if n and (REPOSITORY / n).exists())
    subprocess.run(
        ["tar", "--null", "-T", "-", "-cf", str(source / "tree.tar")],
        cwd=REPOSITORY,
        check=True,
        input=present,
        text=True,
    )
    subprocess.run(["tar", "-xf", "tree.tar"], cwd=source, check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out", "."]
    done = subprocess.run(build, cwd=source, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if ".dist-info/" not in n}


def test_wheel_holds_exactly_the_tracked_package_files(wheel_names: set[str]) -> None:
    expected = _tracked_package_files()
    assert "kvrelay/py.typed" in expected
    assert "kvrelay/v1/router_pb2.pyi" in expected
    assert wheel_names == expected


def test_wheel_puts_nothing_beside_kvrelay(wheel_names: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names} == {"kvrelay"}
