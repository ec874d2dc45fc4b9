"""What every endpoint works with: the client, the configuration, and one request's circumstances."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from kvrelay.client import AsyncClient, GenerationResult, GenerationStream, SamplingParams
from kvrelay.core.cluster_view import ModelInfo
from kvrelay.openai_proxy.access import Grant
from kvrelay.openai_proxy.burst_writer import Burst
from kvrelay.openai_proxy.config import ProxyConfig
from kvrelay.openai_proxy.metrics import ProxyMetrics
from kvrelay.openai_proxy.sampling import for_choice
from kvrelay.openai_proxy.schema.base import SamplingBody
from kvrelay.openai_proxy.service_tiers import priority_of, tenant_name


@dataclass(slots=True, eq=False)
class ProxyService:
    """One worker's. `client` is used on the worker's event loop."""

    config: ProxyConfig
    client: AsyncClient
    metrics: ProxyMetrics
    burst: Burst = field(default_factory=Burst)


@dataclass(slots=True, eq=False)
class Call:
    """One request of a caller. `grant` is what its key allows; `created_s` is Unix time."""

    service: ProxyService
    request_id: str
    grant: Grant
    created_s: int = field(default_factory=lambda: int(time.time()))
    tenant: str = ""
    """By its header or key; empty: the body's `user` is."""
    params: dict[str, str] = field(default_factory=dict)
    """kvrelay's field names -> this caller's, for errors of the cluster."""

    @classmethod
    def of(cls, request: Request) -> Call:
        """What the middleware found out about it."""
        state = request.scope["state"]
        service: ProxyService = request.app.state.service
        call = cls(service, state["request_id"], state["grant"])
        call.tenant = request.headers.get(service.config.tenant_header, "") or call.grant.name
        state["params"] = call.params = {"request_id": "x-request-id", "priority": "service_tier"}
        return call

    def generate(
        self, body: SamplingBody, model: ModelInfo, sampling: SamplingParams, index: int, **prompt: Any
    ) -> GenerationStream:
        """Choice `index` of the request. `prompt` is what `AsyncClient.generate` takes for one.

        Raises:
            InvalidRequest: a field can't be served.
        """
        stream = self.service.client.generate(
            model=model.name,
            sampling=for_choice(sampling, index),
            timeout_s=self.service.config.request_timeout_s,
            ttft_timeout_s=self.service.config.ttft_timeout_s,
            priority=priority_of(body.service_tier, self.grant),
            tenant=tenant_name(self.tenant or body.user),
            request_id=self.request_id if index == 0 else f"{self.request_id}-{index}",
            cache_salt=self.grant.cache_salt(body.cache_salt),
            stop=body.stop,
            include_stop=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
            **prompt,
        )
        # Counted when the request is over, however it ended: who leaves early pays for what was read.
        self.grant.count_at_end(lambda: len(stream.prompt_token_ids) + stream.num_tokens)
        return stream

    def count(self, result: GenerationResult) -> None:
        """Count a finished answer in the metrics."""
        num_prompt, num_output = result.report.num_prompt_tokens, len(result.token_ids)
        self.service.metrics.count_answer(
            result.finish_reason, num_prompt, result.report.num_cached_tokens, num_output
        )


def usage_so_far(streams: Sequence[GenerationStream], num_prompts: int = 1) -> dict[str, Any]:
    """OpenAI's usage object while answers are under way; what a prefix cache held is not known yet."""
    firsts = streams[:: max(1, len(streams) // num_prompts)]
    num_prompt = sum(len(stream.prompt_token_ids) for stream in firsts)
    num_output = sum(stream.num_tokens for stream in streams)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }


def usage_of(results: Sequence[GenerationResult], num_prompts: int = 1) -> dict[str, Any]:
    """OpenAI's usage object: each of `num_prompts` prompts counts once, every output token counts."""
    firsts = results[:: max(1, len(results) // num_prompts)]
    num_prompt = sum(result.report.num_prompt_tokens for result in firsts)
    num_output = sum(len(result.token_ids) for result in results)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(result.report.num_cached_tokens for result in firsts)},
    }
