"""Steady load whose every answer is known in advance, through the library and through the proxy."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Final

import httpx

from kvrelay.client import AsyncClient
from kvrelay.core.errors import KVRelayError
from kvrelay.core.sampling import SamplingParams
from tests.fault_matrix.caller import UnbrokenRun

REQUEST_TIMEOUT_S: Final = 240.0
"""Longer than anything may take: who waits so long hangs."""
NUM_TEXTS: Final = 8
_TEXT_TOKENS: Final = 80
_NUM_PREFIXES: Final = 6
_VOCABULARY: Final = 32_000


@dataclass
class Counts:
    """What came of the load. `faults` are answers that were wrong; `errors` requests that failed, by code."""

    num_answers: int = 0
    num_tokens: int = 0
    num_taken_up_by_client: int = 0
    num_taken_up_by_router: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Traffic:
    """Asks without pause between `begin` and `end`. The proxy's answers are learnt first, by `learn`."""

    def __init__(
        self, client: AsyncClient, http: httpx.AsyncClient, unbroken: UnbrokenRun, rng: Random
    ) -> None:
        self.counts = Counts()
        self._client = client
        self._http = http
        self._unbroken = unbroken
        self._rng = rng
        self._prefixes = [self._tokens(rng.randint(100, 800)) for _ in range(_NUM_PREFIXES)]
        self._texts: list[str] = []
        self._is_over = False
        self._callers: list[asyncio.Task[None]] = []

    def _tokens(self, num: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(1, _VOCABULARY) for _ in range(num))

    async def learn(self) -> None:
        """What the proxy answers while nothing happens."""
        for index in range(NUM_TEXTS):
            self._texts.append(await self._ask_proxy(index))
        assert len(set(self._texts)) == NUM_TEXTS
        assert all(self._texts)

    def begin(self, num_library: int, num_proxy: int) -> None:
        self._is_over = False
        self._callers = [asyncio.create_task(self._ask_on(self._one_by_library)) for _ in range(num_library)]
        self._callers += [asyncio.create_task(self._ask_on(self._one_by_proxy)) for _ in range(num_proxy)]

    async def end(self) -> None:
        """Returns when the last answer is there."""
        self._is_over = True
        await asyncio.gather(*self._callers)

    async def _ask_on(self, ask) -> None:
        while not self._is_over:
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await ask()
                self.counts.num_answers += 1
            except KVRelayError as error:
                self.counts.errors[error.code] += 1
            except httpx.HTTPError as error:
                self.counts.errors[f"proxy {type(error).__name__}"] += 1
            except TimeoutError:
                self.counts.faults.append(f"{ask.__name__}: no end after {REQUEST_TIMEOUT_S:g} s")

    async def _one_by_library(self) -> None:
        rng = self._rng
        prefix = rng.choice(self._prefixes) if rng.random() < 0.5 else ()
        prompt = (*prefix, *self._tokens(rng.randint(8, 700)))
        sampling = SamplingParams(
            max_tokens=rng.randint(8, 150), temperature=0.8, seed=rng.randrange(1 << 30), ignore_eos=True
        )
        expected = self._unbroken.answer(prompt, sampling)
        tokens: list[int] = []
        stream = self._client.generate(prompt, sampling=sampling, decode_text=False)
        async for chunk in stream:
            if chunk.index != len(tokens):
                self.counts.faults.append(f"token {chunk.index} came as number {len(tokens)}")
            tokens += chunk.token_ids
        if tuple(tokens) != expected:
            self.counts.faults.append(f"wrong tokens for a prompt of {len(prompt)}")
        result = stream.result
        self.counts.num_tokens += len(tokens)
        self.counts.num_taken_up_by_client += result.num_retries + result.num_continuations
        self.counts.num_taken_up_by_router += result.report.num_attempts - 1

    async def _one_by_proxy(self) -> None:
        index = self._rng.randrange(NUM_TEXTS)
        if await self._ask_proxy(index) != self._texts[index]:
            self.counts.faults.append(f"another text to prompt {index}")
        self.counts.num_tokens += _TEXT_TOKENS

    async def _ask_proxy(self, index: int) -> str:
        body = {
            "prompt": f"Question {index}: what is the name of river number {index}?",
            "max_tokens": _TEXT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        text = ""
        async with self._http.stream("POST", "/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise httpx.HTTPStatusError(answer.text, request=answer.request, response=answer)
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise httpx.RemoteProtocolError(str(event["error"]))
                    text += event["choices"][0]["text"] if event["choices"] else ""
        return text
