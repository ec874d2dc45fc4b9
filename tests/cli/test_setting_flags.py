"""Every setting is a flag: found by as much of its name as is unique, and read by its type."""

from __future__ import annotations

import pytest

from kvrelay.cli.config_file import Override, load_config
from kvrelay.cli.setting_flags import as_argument, overrides_of, settings_of
from kvrelay.core.errors import InvalidRequest

ROUTER = ("router",)
NODE = ("engine", "transfer", "node")


@pytest.mark.parametrize(
    ("arguments", "sections", "key", "value"),
    [
        (["--queue-timeout-s", "5"], ROUTER, "router.core.queue_timeout_s", 5),
        (["--queue-timeout-s=5.5"], ROUTER, "router.core.queue_timeout_s", 5.5),
        (["--core-queue-timeout-s", "5"], ROUTER, "router.core.queue_timeout_s", 5),
        (["--router.core.queue_timeout_s=5"], ROUTER, "router.core.queue_timeout_s", 5),
        (["--router-id", "7"], ROUTER, "router.router_id", "7"),
        (["--sim-prefill-base-s=0.05"], NODE, "engine.sim.prefill_base_s", 0.05),
        (["--max-num-batched-tokens=16"], NODE, "engine.max_num_batched_tokens", 16),
        (["--itl-promise-ms=22.5"], NODE, "engine.itl_promise_ms", 22.5),
        (["--transfer-connect-timeout-s", "2"], NODE, "transfer.connect_timeout_s", 2),
        (["--node.connect-timeout-s", "2"], NODE, "node.connect_timeout_s", 2),
        (["--verify-checksums"], NODE, "transfer.verify_checksums", True),
        (["--no-verify-checksums"], NODE, "transfer.verify_checksums", False),
        (["--verify-checksums=false"], NODE, "transfer.verify_checksums", False),
        (["--routers", '["a:1", "b:2"]'], NODE, "node.routers", ["a:1", "b:2"]),
        (["--num-blocks", "many"], NODE, "engine.num_blocks", "many"),
        (["--link-idle-s", "-1"], NODE, "transfer.link_idle_s", -1),
    ],
)
def test_a_flag_sets_the_setting_that_it_names(
    arguments: list[str], sections: tuple[str, ...], key: str, value: object
) -> None:
    (found,) = overrides_of({}, arguments, sections).items()
    assert (found[0], found[1].value) == (key, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queue-timeout", "5"], "did you mean --queue-timeout-s?"),
        (["--zzz"], "no such option --zzz"),
        (["--connect-timeout-s", "5"], "ambiguous: --transfer-connect-timeout-s or --node-connect-timeout-s"),
        (["--num-blocks"], "needs a value"),
        (["--num-blocks", "--verify-checksums"], "needs a value"),
        (["stray"], "unexpected argument 'stray'"),
        (["--"], "unexpected argument"),
        (["--no-verify-checksums=1"], "takes no value"),
        (["--role", "decode"], "no such option --role"),
    ],
)
def test_what_is_no_setting_is_refused_by_name(arguments: list[str], message: str) -> None:
    sections = ROUTER if "queue" in arguments[0] else NODE
    with pytest.raises(InvalidRequest) as raised:
        overrides_of({}, arguments, sections)
    assert message in raised.value.message


def test_listed_flags_that_were_not_given_set_nothing() -> None:
    overrides = overrides_of(
        {"router.grpc_port": ("--port", None), "router.router_id": ("--id", "a")}, [], ROUTER
    )
    assert overrides == {"router.router_id": Override("--id", "a")}


def test_every_setting_can_be_handed_to_another_process() -> None:
    for section in ("router", "engine", "transfer", "node"):
        built = load_config(None, {}, ("engine", "transfer", section)).built[section]
        for setting in settings_of([section]):
            value: object = built
            for name in setting.key.split(".")[1:]:
                value = getattr(value, "sim_timing" if name == "sim" else name)
            if value is None:
                continue
            plain = list(value) if isinstance(value, tuple) else value
            (found,) = overrides_of({}, [as_argument(setting.key, plain)], (section,)).items()
            assert (found[0], found[1].value) == (setting.key, plain)
