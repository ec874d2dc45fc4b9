"""What the shell does when its own parts fail or stand still."""

import random

import pytest

from kvrelay.core.node_messages import NodeDescription, Role
from kvrelay.router.attachments import Attachments
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.core import RouterCore
from kvrelay.router.events import Ticked
from kvrelay.router.least_loaded import LeastLoaded
from kvrelay.router.metrics import RouterMetrics
from kvrelay.router.server_config import RouterConfig
from kvrelay.router.shell import RouterShell
from kvrelay.router.tokenizer_store import MAX_ASSEMBLIES, TokenizerStore


class FixedClock:
    def now_s(self):
        return 100.0


class BrokenCore(RouterCore):
    def handle(self, event, now_s):
        raise AssertionError("the books disagree")


async def test_a_bug_in_the_core_is_shown_to_the_process_and_not_swallowed():
    config = RouterConfig()
    core = BrokenCore(config.core, 1, LeastLoaded(), random.Random(1))
    shell = RouterShell(config, core, FixedClock(), RouterMetrics())
    with pytest.raises(AssertionError, match="the books disagree"):
        shell.dispatch(Ticked())
    assert "the books disagree" in str(shell.bug.result())


def attachments():
    core = RouterCoreConfig()
    return Attachments(10, 10, heartbeat_s=core.heartbeat_s, node_silence_s=core.node_silence_s)


def describe(fingerprint):
    return NodeDescription("p0", 1, Role.PREFILL, "m", "fake", fingerprint, 10, 10, 10, 16, 4)


async def test_a_node_is_silent_only_while_the_router_itself_has_not_stood_still():
    nodes = attachments()
    nodes.add(describe(None), 0.0)
    assert not nodes.tick(0.1)
    assert not nodes.tick(60.0), "the router was stopped for a minute; the node could not be heard"
    silent = [now_s for now_s in (60.5 + step / 2 for step in range(20)) if nodes.tick(now_s)]
    assert silent
    assert 64.5 <= silent[0] <= 66.0


async def test_a_heartbeat_is_due_only_when_nothing_else_was_sent():
    nodes = attachments()
    attachment = nodes.add(describe(None), 0.0)
    nodes.tick(0.5)
    assert attachment.last_sent_s == 0.0
    nodes.tick(1.0)
    assert attachment.last_sent_s == 1.0
    assert (await attachment.outbox.take()).commands == ()


async def test_bundles_on_their_way_are_bounded_and_a_lost_one_makes_room():
    store = TokenizerStore(max_bundles=2)
    assert store.begin("") is None
    begun = [store.begin(f"{number:064x}") for number in range(MAX_ASSEMBLIES + 1)]
    assert [assembly is not None for assembly in begun] == [True] * MAX_ASSEMBLIES + [False]
    store.abandon(f"{0:064x}")
    assert store.begin(f"{9:064x}") is not None


async def test_the_bundle_asked_for_least_lately_goes_first():
    store = TokenizerStore(max_bundles=2)
    for digest in ("a", "b"):
        store.begin(digest)
        store.put(digest, b"x")
    assert await store.get("a", 0.0) == b"x"
    store.begin("c")
    store.put("c", b"x")
    assert await store.get("b", 0.0) is None
    assert await store.get("a", 0.0) == b"x"
