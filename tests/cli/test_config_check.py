"""`kvrelay config check`: what it prints, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvrelay.router.config import RouterCoreConfig


def test_a_sound_file_prints_ok_and_what_it_configures(invoke: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[router]\ngrpc_port = 1234\n[cluster]\n")
    outcome = invoke("config", "check", str(file))
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        f"ok: {file} configures a router [router], kvrelay up [cluster]",
        "  router.grpc_port = 1234",
    ]


def test_all_shows_the_defaults_too(invoke: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[router]\ngrpc_port = 1234\n")
    lines = invoke("config", "check", "--all", str(file)).out.splitlines()
    assert "  router.http_port = 7071  # default" in lines
    assert "  router.grpc_port = 1234" in lines
    assert f"  router.core.max_attempts = {RouterCoreConfig().max_attempts}  # default" in lines


def test_json_of_a_sound_file_holds_every_effective_value(invoke: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[node]\nrouters = ['a:1']\n[engine]\nmodel = 'sim'\n")
    found = json.loads(invoke("config", "check", "--json", str(file)).out)
    assert found["ok"] is True
    assert found["sections"]["node"]["routers"] == ["a:1"]
    assert found["sections"]["engine"]["engine"] == "sim"
    assert found["sections"]["engine"]["sim"]["prefill_base_s"] > 0
    assert "role" not in found["sections"]["node"]


def test_faults_go_to_stderr_one_a_line_with_exit_2(invoke: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[router]\ngrpc_prot = 1\nhttp_port = 'x'\n")
    outcome = invoke("config", "check", str(file))
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.splitlines() == [
        f"{file}:2: router.grpc_prot is not a setting; did you mean router.grpc_port?",
        f'{file}:3: router.http_port must be an integer, got "x"',
        "2 faults",
    ]


def test_json_of_a_faulty_file_lists_the_faults(invoke: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[router]\ngrpc_port = 70000\n")
    outcome = invoke("config", "check", "--json", str(file))
    assert outcome.code == 2
    found = json.loads(outcome.out)
    assert found["ok"] is False
    (fault,) = found["faults"]
    assert (fault["line"], fault["key"]) == (2, "router.grpc_port")


def test_a_proxys_section_is_checked_like_any_other(invoke: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[proxy]\nport = 8080\ntool_format = "llama"\n')
    outcome = invoke("config", "check", str(file))
    assert outcome.code == 0
    assert "proxy [proxy]" in outcome.out
    assert '  proxy.tool_format = "llama"' in outcome.out.splitlines()
    file.write_text('[proxy]\nworkers = 0\ntool_format = "xml"\nruoters = []\nrequest_timeout_s = 0\n')
    outcome = invoke("config", "check", str(file))
    assert outcome.code == 2
    for what in ("proxy.workers", "proxy.tool_format", "proxy.routers?", "proxy.request_timeout_s"):
        assert what in outcome.err
