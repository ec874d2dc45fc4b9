"""One request in a known state, and what stands around it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random

from kvrelay.client import AsyncClient
from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.explanation import Explanation
from kvrelay.core.node_messages import NodeLoad
from kvrelay.core.sampling import SamplingParams
from tests.fault_matrix.breakable_cluster import WAIT_S, BreakableCluster, NotSeen
from tests.fault_matrix.caller import Caller, UnbrokenRun
from tests.fault_matrix.proxy_caller import ProxyCaller, proxied_text
from tests.fault_matrix.relay import Relay

_VOCABULARY = 32_000
_POLL_S = 0.01


@dataclass
class Scene:
    """Built up by `tests.fault_matrix.states`; faults find their targets here.

    `router`, `prefill` and `decode` serve the request (where it has not been placed: would do as well);
    `kv_receiver` is the node that its KV is on its way to. `held` relays hold something back until the fault
    has struck, `blockers` keep nodes busy until then.
    """

    cluster: BreakableCluster
    client: AsyncClient
    unbroken: UnbrokenRun
    rng: Random
    caller: Caller | None = None
    router: str = ""
    prefill: str = "p0"
    decode: str = "d0"
    kv_receiver: str = "d0"
    held: list[Relay] = field(default_factory=list)
    blockers: list[asyncio.Task[object]] = field(default_factory=list)
    struck_s: float = 0.0
    lifted_s: float = 0.0
    remarks: list[str] = field(default_factory=list)
    """What was wrong besides what the client saw."""

    @property
    def it(self) -> Caller:
        assert self.caller is not None
        return self.caller

    @property
    def other_router(self) -> str:
        return "router-b" if self.router == "router-a" else "router-a"

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        """One that nobody has asked before."""
        return tuple(self.rng.randrange(1, _VOCABULARY) for _ in range(num_tokens))

    def ask(self, prompt: tuple[int, ...], num_tokens: int, order: str = "") -> Caller:
        """Start the request; `order` as `placing_router` takes it, with a dot in front."""
        seed = self.rng.randrange(1 << 30)
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.9, seed=seed, ignore_eos=True)
        expected = self.unbroken.answer(prompt, sampling)
        name = f"it{self.rng.randrange(1 << 40):x}{order}"
        self.caller = Caller(self.client, name, prompt, sampling, expected)
        self.caller.start()
        return self.caller

    async def ask_proxy(self, num_tokens: int) -> Caller:
        """Start a request through the proxy that has been answered once, undisturbed."""
        sampling = SamplingParams(max_tokens=num_tokens)
        name, text = f"it{self.rng.randrange(1 << 40):x}", f"Once upon a time, {self.rng.randrange(1 << 40)}"
        base_url = self.cluster.base_url
        expected = [piece async for piece in proxied_text(base_url, text, num_tokens, f"{name}-first")]
        await self.cluster.until_whole()
        self.caller = ProxyCaller(
            self.client, name, (), sampling, tuple(expected), base_url=base_url, text=text
        )
        self.caller.start()
        return self.caller

    def block(self, router: str, num_prompt_tokens: int, order: str = "") -> None:
        """Have another request keep nodes busy until the fault has struck."""
        name = f"blocker{self.rng.randrange(1 << 40):x}{order}"
        prompt = self.prompt(num_prompt_tokens)
        asking = self.cluster.observers[router].complete(prompt, request_id=name, decode_text=False)
        self.blockers.append(asyncio.create_task(asking))

    def strike(self) -> None:
        """The fault happens now."""
        self.struck_s = self.lifted_s = time.monotonic()

    def lift(self) -> None:
        """What was stopped or cut is not any more."""
        self.lifted_s = time.monotonic()

    async def let_go(self) -> None:
        """What was arranged to reach the state ends."""
        for relay in self.held:
            relay.let_pass()
        for blocker in self.blockers:
            blocker.cancel()
        await asyncio.gather(*self.blockers, return_exceptions=True)

    # ---- looking ---------------------------------------------------------------------------------

    async def until(self, what: str, is_so: Callable[[], Awaitable[bool]]) -> None:
        """Wait for something.

        Raises:
            NotSeen: it did not come to pass within `WAIT_S`.
        """
        try:
            async with asyncio.timeout(WAIT_S):
                while not await is_so():  # noqa: ASYNC110  # other processes' states
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise NotSeen(f"not seen within {WAIT_S:g} s: {what}") from None

    async def until_placed(
        self, state: str, is_so: Callable[[Explanation, dict[str, NodeLoad]], bool]
    ) -> None:
        """Wait until the request is in that state of the ledger, and the nodes' loads are so; notes where."""

        async def is_there() -> bool:
            found = await self.cluster.explanation(self.it.request_id)
            if found is None:
                return False
            router, explanation = found
            now = explanation.measured.state
            if now != state:
                if now in ("done", "failed") and state not in ("done", "failed"):
                    raise NotSeen(f"the request was {now} before it was seen {state}")
                return False
            decision = explanation.decision
            self.router, self.prefill = router, str(decision.prefill_node)
            self.decode = self.kv_receiver = str(decision.decode_node)
            states = await self.cluster.states()
            return router in states and is_so(explanation, _loads(states[router]))

        await self.until(f"the request is {state}", is_there)


def _loads(state: ClusterState) -> dict[str, NodeLoad]:
    return {node.node_id: node.load or NodeLoad() for node in state.nodes}
