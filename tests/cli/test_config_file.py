"""A bad config file: all its faults at once, each at its line, and never a traceback."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrelay.cli.config import ClusterConfig
from kvrelay.cli.config_file import MAX_FILE_BYTES, SECTIONS, LoadedConfig, Override, load_config
from kvrelay.cli.faults import Fault, FaultyConfigError
from kvrelay.core.node_messages import Role
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.node.config import NodeConfig
from kvrelay.openai_proxy.config import ProxyConfig, ToolFormat
from kvrelay.router.server_config import RouterConfig

EXAMPLES = sorted((Path(__file__).parents[2] / "deploy" / "examples").glob("*.toml"))
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        file = tmp_path / "some.toml"
        file.write_text(text)
        return file

    return write_file


def faults_of(file: Path, overrides: dict[str, Override] | None = None) -> tuple[Fault, ...]:
    with pytest.raises(FaultyConfigError) as raised:
        load_config(file, overrides or {}, ())
    return raised.value.faults


ONE_FAULT = {
    "unknown key": (
        "[router]\ngrpc_prot = 1\n",
        2,
        "router.grpc_prot",
        "is not a setting",
        "router.grpc_port?",
    ),
    "unknown key, none like it": (
        "[transfer]\nzzz = 1\n",
        2,
        "transfer.zzz",
        "is not a setting",
        "takes adv",
    ),
    "unknown section": ("[ruoter]\n", 1, "ruoter", "is not a section", "did you mean router?"),
    "unknown nested key": (
        "[router]\n[router.core]\nmax_atempts = 1\n",
        3,
        "router.core.max_atempts",
        "is not a setting",
        "router.core.max_attempts?",
    ),
    "number in quotes": (
        '[router]\ngrpc_port = "7070"\n',
        2,
        "router.grpc_port",
        "an integer",
        "= 7070, without",
    ),
    "boolean in quotes": (
        '[transfer]\nverify_checksums = "true"\n',
        2,
        "transfer.verify_checksums",
        "must be true or false",
        "without quotes",
    ),
    "boolean for integer": ("[router]\ngrpc_port = true\n", 2, "router.grpc_port", "must be an integer", ""),
    "fraction for integer": ("[router]\ngrpc_port = 1.5\n", 2, "router.grpc_port", "got 1.5", ""),
    "number for string": ("[router]\nrouter_id = 5\n", 2, "router.router_id", "must be a string", '= "5"'),
    "string for list": ('[node]\nrouters = "a:1"\n', 2, "node.routers", "must be a list", '["a:1"]'),
    "wrong entry in list": ("[node]\nrouters = [1]\n", 2, "node.routers", "must be a list", ""),
    "value for table": ("[router]\ncore = 3\n", 2, "router.core", "must be a table", "write [router.core]"),
    "value for section": ("router = 3\n", 1, "router", "must be a table", "write [router]"),
    "array of tables for section": ("[[router]]\n", 1, "router", "must be a table", "write [router]"),
    "table for value": ("[router.grpc_port]\nx = 1\n", 1, "router.grpc_port", "got a table", ""),
    "not one of the choices": ('[engine]\nengine = "vlm"\n', 2, "engine.engine", 'one of "torch", "sim"', ""),
    "out of range": ("[router]\n\ngrpc_port = 70000\n", 3, "router.grpc_port", "from 0 to 65535", ""),
    "not a number": ("[router.core]\nlease_s = nan\n", 2, "router.core.lease_s", "must be a number", ""),
    "two keys that clash": (
        "[transfer]\nlisten_host = '0.0.0.0'\n",
        2,
        "transfer.listen_host",
        "advertised_host must be given",
        "",
    ),
    "nested dataclass's own check": (
        "[engine.sim]\ndecode_base_s = -1.0\n",
        2,
        "engine.sim.decode_base_s",
        "sim",
        "",
    ),
    "date": ("[router]\nrouter_id = 2020-01-01\n", 2, "router.router_id", "must be a string", ""),
    "syntax": ("[router]\nrouter_id = a\n", 2, "`router_id = a`", "is not TOML", "quotes"),
    "given twice": (
        "[router]\ngrpc_port = 1\ngrpc_port = 2\n",
        3,
        "`grpc_port = 2`",
        "given twice",
        "one of them",
    ),
}


@pytest.mark.parametrize(("text", "line", "key", "message", "hint"), ONE_FAULT.values(), ids=ONE_FAULT.keys())
def test_a_fault_names_line_key_and_what_would_be_right(
    text: str, line: int, key: str, message: str, hint: str, write: Write
) -> None:
    (fault,) = faults_of(write(text))
    assert (fault.line, fault.key) == (line, key)
    assert message in fault.message
    assert hint in fault.hint


def test_all_faults_of_a_file_come_at_once_in_the_order_of_lines(write: Write) -> None:
    text = """\
[router]
grpc_port = 70000
listen_hots = "x"
http_port = oops

[router.core]
max_attempts = "four"
lease_s = 1.0

[transfer]
transport = "tpc"
[ruoter]
x = 1
"""
    found = faults_of(write(text))
    assert [(fault.line, fault.key) for fault in found] == [
        (2, "router.grpc_port"),
        (3, "router.listen_hots"),
        (4, "`http_port = oops`"),
        (7, "router.core.max_attempts"),
        (8, "router.core.lease_s"),
        (11, "transfer.transport"),
        (12, "ruoter"),
    ]


def test_a_value_given_by_a_flag_is_blamed_on_the_flag(write: Write) -> None:
    file = write("[router]\ngrpc_port = 1\n")
    (fault,) = faults_of(file, {"router.grpc_port": Override("--port", 70000)})
    assert (fault.flag, fault.line) == ("--port", None)
    assert fault.describe(str(file)).startswith("--port: router.grpc_port must be")


def test_a_flag_beats_the_file_and_the_file_the_default(write: Write) -> None:
    file = write("[router]\ngrpc_port = 1\nhttp_port = 2\n")
    router = load_config(file, {"router.grpc_port": Override("--port", 3)}, ()).built["router"]
    assert isinstance(router, RouterConfig)
    assert (router.grpc_port, router.http_port, router.listen_host) == (3, 2, RouterConfig().listen_host)


def test_a_flag_that_meets_a_value_where_a_table_belongs_is_a_fault(write: Write) -> None:
    overrides = {"router.core.lease_s": Override("--lease-s", 3)}
    assert "must be a table" in faults_of(write("[router]\ncore = 3\n"), overrides)[0].message


def test_sections_become_the_packages_own_dataclasses(write: Write) -> None:
    text = """\
[router.core]
max_attempts = 2
[engine]
model = "sim"
[engine.sim]
prefill_base_s = 1
[transfer]
transport = "tcp"
[node]
routers = ["a:1", "b:2"]
[cluster]
decode = 3
[proxy]
tool_format = "hermes"
request_timeout_s = 5
"""
    built = load_config(write(text), {}, (), "decode").built
    assert set(built) == set(SECTIONS)
    router, engine, transfer, node, cluster, proxy = (
        built[name] for name in ("router", "engine", "transfer", "node", "cluster", "proxy")
    )
    assert proxy == ProxyConfig(tool_format=ToolFormat.HERMES, request_timeout_s=5.0)
    assert isinstance(router, RouterConfig)
    assert router.core.max_attempts == 2
    assert isinstance(engine, EngineConfig)
    assert (engine.engine, engine.sim_timing.prefill_base_s) == (EngineKind.SIM, 1.0)
    assert isinstance(engine.sim_timing.prefill_base_s, float)
    assert transfer == KVTransferConfig(transport="tcp")
    assert isinstance(node, NodeConfig)
    assert (node.routers, node.role) == (("a:1", "b:2"), Role.DECODE)
    assert node.engine is engine
    assert node.transfer is transfer
    assert cluster == ClusterConfig(decode=3)


def test_needed_sections_are_built_without_a_file() -> None:
    loaded = load_config(None, {}, ("router", "engine"))
    assert loaded.built["router"] == RouterConfig()
    assert loaded.built["engine"] == EngineConfig(model="smollm2")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.toml", "does not exist"),
        (lambda folder: folder, "is not a file"),
        (lambda folder: _written(folder, b"x" * (MAX_FILE_BYTES + 1)), "larger than"),
        (lambda folder: _written(folder, b"a = 1\n\xff"), "not UTF-8"),
        (lambda folder: folder / "nul\0byte", ""),
    ],
)
def test_a_file_that_cannot_be_read_says_why(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    (fault,) = faults_of(make(tmp_path))
    assert message in fault.message


def _written(folder: Path, data: bytes) -> Path:
    file = folder / "bad.toml"
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_shipped_examples_are_sound_and_show_the_defaults(file: Path) -> None:
    loaded = load_config(file, {}, ())
    assert set(loaded.built) == set(tomllib.loads(file.read_text()))


def test_examples_cover_every_service() -> None:
    covered = {name for file in EXAMPLES for name in load_config(file, {}, ()).built}
    assert covered == set(SECTIONS)


VALUES = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
).map(repr)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), value=VALUES, noise=st.text(max_size=8))
def test_a_mangled_example_is_loaded_or_refused_but_never_a_traceback(
    seed: int, value: str, noise: str, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    lines = rng.choice(EXAMPLES).read_text().splitlines()
    for _ in range(rng.randint(1, 4)):
        index = rng.randrange(len(lines))
        key = lines[index].partition("=")[0]
        lines[index] = rng.choice(
            [f"{key}= {value}", lines[index] + noise, noise, key, lines[rng.randrange(len(lines))]]
        )
    file = tmp_path / "mangled.toml"
    file.write_text("\n".join(lines), errors="surrogatepass" if noise.isprintable() else "replace")
    outcome = loaded_or_refused(file)
    if isinstance(outcome, FaultyConfigError):
        assert outcome.faults
        assert all(fault.message for fault in outcome.faults)
        assert len(outcome.message.splitlines()) == len(outcome.faults)


def loaded_or_refused(file: Path) -> LoadedConfig | FaultyConfigError:
    try:
        return load_config(file, {}, ())
    except FaultyConfigError as error:
        return error
