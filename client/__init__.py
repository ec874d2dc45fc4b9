"""The client library: ask a kvrelay cluster, from asynchronous or blocking code.

    async with AsyncClient("router1:7070,router2:7070") as client:
        stream = client.generate("Once upon a time", sampling=SamplingParams(max_tokens=64))
        async for chunk in stream:
            print(chunk.text, end="")
        print(stream.result.report)

Needs no torch and no transformers; tokenizers come from the cluster.
"""

from kvrelay.client.async_client import AsyncClient
from kvrelay.client.config import ClientConfig
from kvrelay.client.generation_stream import GenerationStream
from kvrelay.client.model_tokenizer import ModelTokenizer
from kvrelay.client.results import GenerationChunk, GenerationResult
from kvrelay.client.sync_client import BlockingStream, Client
from kvrelay.core.explanation import Candidate, Decision, Explanation, MeasuredRequest
from kvrelay.core.request import FinishReason, TokenLogprobs
from kvrelay.core.request_report import RequestReport
from kvrelay.core.sampling import Grammar, GrammarKind, SamplingParams

__all__ = [
    "AsyncClient",
    "BlockingStream",
    "Candidate",
    "Client",
    "ClientConfig",
    "Decision",
    "Explanation",
    "FinishReason",
    "GenerationChunk",
    "GenerationResult",
    "GenerationStream",
    "Grammar",
    "GrammarKind",
    "MeasuredRequest",
    "ModelTokenizer",
    "RequestReport",
    "SamplingParams",
    "TokenLogprobs",
]
