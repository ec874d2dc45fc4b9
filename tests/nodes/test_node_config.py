"""Node configuration and the files that a node reads and writes."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.core.node_messages import Role
from kvrelay.decode_node.main import run_decode_node
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.node.config import NodeConfig
from kvrelay.node.load_progress import LoadProgress
from kvrelay.node.ready_file import write_ready_file
from kvrelay.node.sd_notify import Notifier
from kvrelay.node.tokenizer_bundle import build_tokenizer_bundle
from kvrelay.prefill_node.main import run_prefill_node

ENGINE = EngineConfig("sim", EngineKind.SIM, num_blocks=8)


def test_all_faults_of_a_configuration_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        NodeConfig(
            Role.PREFILL,
            ENGINE,
            routers=("nowhere", "h:1", "h:1"),
            node_id="a\nb",
            max_attempts_in_flight=0,
            drain_timeout_s=-1,
            reconnect_initial_s=9,
            log_level="loud",
        )
    lines = caught.value.message.splitlines()
    assert len(lines) == 7
    for name in ("routers: 'nowhere'", "twice", "node_id", "max_attempts", "drain", "reconnect", "log_level"):
        assert any(name in line for line in lines), name


@pytest.mark.parametrize("address", ["", ":7070", "host", "host:0", "host:70000", "host:x"])
def test_a_router_address_must_be_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        NodeConfig(Role.DECODE, ENGINE, routers=(address,))


def test_a_node_is_not_run_in_the_other_role() -> None:
    with pytest.raises(ConfigError, match="role"):
        run_prefill_node(NodeConfig(Role.DECODE, ENGINE))
    with pytest.raises(ConfigError, match="role"):
        run_decode_node(NodeConfig(Role.PREFILL, ENGINE))


def test_ready_file_is_whole_and_leaves_no_partial(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    write_ready_file(path, {"pid": 1, "role": "prefill"})
    write_ready_file(path, {"pid": 2, "role": "prefill"})
    assert json.loads(path.read_text()) == {"pid": 2, "role": "prefill"}
    assert list(tmp_path.iterdir()) == [path]


def test_loading_prints_each_tenth_once() -> None:
    out = io.StringIO()
    progress = LoadProgress(out, Notifier())
    for step in range(101):
        progress(step / 100, "loading tiny")
    lines = out.getvalue().splitlines()
    assert lines == [f"{percent:3d} % loading tiny" for percent in range(0, 101, 10)]


def write_model(folder: Path, **config: object) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def bundle_of(folder: Path) -> dict[str, object]:
    data = build_tokenizer_bundle(folder)
    assert data is not None
    loaded: dict[str, object] = json.loads(zlib.decompress(data))
    return loaded


def test_tokenizer_bundle_holds_tokenizer_template_and_special_tokens(tmp_path: Path) -> None:
    write_model(tmp_path, chat_template="{{ x }}", bos_token="<s>", eos_token={"content": "</s>"})
    assert bundle_of(tmp_path) == {
        "tokenizer": {"model": {"type": "BPE"}},
        "chat_template": "{{ x }}",
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
    }
    assert build_tokenizer_bundle(tmp_path) == build_tokenizer_bundle(tmp_path)


def test_a_template_file_goes_before_the_configuration(tmp_path: Path) -> None:
    write_model(tmp_path, chat_template="old")
    (tmp_path / "chat_template.jinja").write_text("new")
    assert bundle_of(tmp_path)["chat_template"] == "new"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    write_model(tmp_path, chat_template=named)
    assert bundle_of(tmp_path)["chat_template"] == "d"


def test_a_folder_without_tokenizer_gives_no_bundle(tmp_path: Path) -> None:
    assert build_tokenizer_bundle(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        build_tokenizer_bundle(tmp_path)
