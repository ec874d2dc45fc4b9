"""One question to a cluster and its streamed answer: what `generate` and `up --once` share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvrelay.core.errors import InvalidRequest
from kvrelay.core.sampling import SamplingParams

if TYPE_CHECKING:
    from kvrelay.client import AsyncClient, GenerationResult


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. Either `text` or `token_ids`; text is a user's chat message unless `is_raw`.

    Raises:
        InvalidRequest: nothing is asked, or `system` goes with a prompt that is no chat.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    is_raw: bool = False
    system: str = ""
    model: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    timeout_s: float | None = None
    ttft_timeout_s: float | None = None
    priority: str = "normal"
    tenant: str = ""
    request_id: str = ""

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.token_ids):
            raise InvalidRequest("PROMPT must not be empty", field="PROMPT")
        if self.system and (self.is_raw or self.token_ids):
            raise InvalidRequest("--system needs a chat: not with --raw or --token-ids", field="--system")

    def messages(self) -> list[dict[str, str]] | None:
        """The chat, or None where the prompt is sent as it is."""
        if self.is_raw or self.token_ids:
            return None
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text}]


async def ask(client: AsyncClient, question: Question, on_text: Callable[[str], None]) -> GenerationResult:
    """Send `question`; `on_text` gets the answer piece by piece (token ids where there is no text).

    Leaving early, by an error or a cancellation, cancels the request at the router.

    Raises:
        KVRelayError: whatever the cluster answers instead.
    """
    messages = question.messages()
    prompt = None if messages else (question.token_ids or question.text)
    stream = client.generate(
        prompt,
        messages=messages,
        model=question.model,
        sampling=question.sampling,
        timeout_s=question.timeout_s,
        ttft_timeout_s=question.ttft_timeout_s,
        priority=question.priority,
        tenant=question.tenant,
        request_id=question.request_id,
        decode_text=not question.token_ids,
    )
    if not question.token_ids:
        await client.tokenizer(question.model)  # fetched once, which is not a part of the answer's TTFT
    async with stream:
        async for chunk in stream:
            on_text("".join(f"{token} " for token in chunk.token_ids) if question.token_ids else chunk.text)
    return stream.result


def write_out(text: str) -> None:
    """Show a piece of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
