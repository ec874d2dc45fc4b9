"""A caller that asks the OpenAI proxy, and sees text."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx

from tests.fault_matrix.caller import Caller


async def proxied_text(base_url: str, prompt: str, num_tokens: int, request_id: str) -> AsyncIterator[str]:
    """The answer, event by event.

    Raises:
        httpx.HTTPError: the connection broke, or the proxy says that the request failed.
    """
    body = {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0.9,
        "seed": 5,
        "ignore_eos": True,
        "stream": True,
    }
    headers = {"x-request-id": request_id}
    async with (
        httpx.AsyncClient(base_url=base_url, timeout=300) as http,
        http.stream("POST", "/completions", json=body, headers=headers) as answer,
    ):
        if answer.status_code != 200:
            raise httpx.RemoteProtocolError(f"{answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise httpx.RemoteProtocolError(str(event["error"]))
            if event["choices"] and (text := event["choices"][0]["text"]):
                yield text


@dataclass
class ProxyCaller(Caller):
    """`pieces` are the events' texts, one or more tokens each; `text` is the prompt."""

    base_url: str = ""
    text: str = ""

    async def _read(self) -> None:
        num_tokens = self.sampling.max_tokens
        try:
            async for piece in proxied_text(self.base_url, self.text, num_tokens, self.request_id):
                self.pieces.append(piece)
                self.arrivals_s.append(time.monotonic())
        except httpx.HTTPError as error:
            self.error = error
        finally:
            self.ended_s = time.monotonic()
            self.ended.set()

    @property
    def is_beginning(self) -> bool:
        return self._expected_text.startswith("".join(map(str, self.pieces)))

    @property
    def is_whole(self) -> bool:
        return self._expected_text == "".join(map(str, self.pieces))

    @property
    def progress(self) -> str:
        return f"{sum(len(str(piece)) for piece in self.pieces)} of {len(self._expected_text)} characters"

    @property
    def _expected_text(self) -> str:
        return "".join(map(str, self.expected))
