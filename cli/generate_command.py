"""`kvrelay generate`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kvrelay.cli.generate_options import (
    AsJson,
    FrequencyPenalty,
    IgnoreEos,
    JsonSchema,
    Logprobs,
    MaxTokens,
    MinP,
    MinTokens,
    ModelName,
    PresencePenalty,
    PriorityName,
    Raw,
    Regex,
    RepetitionPenalty,
    RequestIdText,
    Seed,
    Stats,
    StopTokenIds,
    System,
    Temperature,
    Tenant,
    Timeout,
    TokenIds,
    TopK,
    TopP,
    TtftTimeout,
    grammar_of,
)
from kvrelay.cli.options import DEFAULT_ROUTER, RouterAddresses

if TYPE_CHECKING:
    from kvrelay.cli.ask import Question
    from kvrelay.client import GenerationResult

_EPILOG: Final = """Examples:

kvrelay generate "Name three rivers."

kvrelay generate --temperature 0.8 --top-p 0.95 --seed 7 --stats "Tell me a story."

kvrelay generate --raw --max-tokens 20 "Once upon a time"

cat question.txt | kvrelay generate --json -

Exit status: 0 answered; 1 failed; 2 bad request; 3 no router, no node or no room; 130 Ctrl-C."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("generate", epilog=_EPILOG)(generate)


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask; - reads it from stdin.")],
    routers: RouterAddresses = None,
    model: ModelName = "",
    raw: Raw = False,
    system: System = "",
    token_ids: TokenIds = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop_token_ids: StopTokenIds = None,
    ignore_eos: IgnoreEos = False,
    logprobs: Logprobs = None,
    min_tokens: MinTokens = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    timeout_s: Timeout = None,
    ttft_timeout_s: TtftTimeout = None,
    priority: PriorityName = "normal",
    tenant: Tenant = "",
    request_id: RequestIdText = "",
    stats: Stats = False,
    as_json: AsJson = False,
) -> None:
    """Ask a cluster, and stream the answer to stdout. Ctrl-C cancels the request at the router."""
    from kvrelay.cli.ask import Question

    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop_token_ids": tuple(stop_token_ids) if stop_token_ids else None,
        "ignore_eos": ignore_eos,
        "num_logprobs": logprobs,
        "min_tokens": min_tokens,
        "grammar": grammar_of(json_schema, regex),
    }
    text = _read_prompt(prompt)
    question = Question(
        text="" if token_ids else text,
        token_ids=_parse_token_ids(text) if token_ids else (),
        is_raw=raw,
        system=system,
        model=model,
        sampling=_sampling_of(given),
        timeout_s=timeout_s,
        ttft_timeout_s=ttft_timeout_s,
        priority=priority,
        tenant=tenant,
        request_id=request_id,
    )
    addresses = list(routers or [DEFAULT_ROUTER])
    asyncio.run(_generate(addresses, question, stats, as_json))


def _sampling_of(given: Mapping[str, Any]) -> Any:
    from kvrelay.core.sampling import SamplingParams

    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _read_prompt(prompt: str) -> str:
    from kvrelay.core.errors import InvalidRequest

    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the prompt on stdin is not UTF-8 text: {error.reason}", field="PROMPT"
        ) from error


def _parse_token_ids(text: str) -> tuple[int, ...]:
    from kvrelay.core.errors import InvalidRequest

    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() and len(word) <= 10 for word in words):
        raise InvalidRequest(
            f"PROMPT must be token ids as in 1,2,3 with --token-ids, got {text[:60]!r}", field="PROMPT"
        )
    return tuple(int(word) for word in words)


async def _generate(addresses: list[str], question: Question, stats: bool, as_json: bool) -> None:
    from kvrelay.cli.ask import ask, write_out
    from kvrelay.client import AsyncClient

    try:
        async with AsyncClient(addresses) as client:
            result = await ask(client, question, (lambda text: None) if as_json else write_out)
    except BaseException:
        if sys.stdout.isatty():
            print()  # what follows on the terminal begins a line of its own
        raise
    _print_end(result, stats, as_json)


def _print_end(result: GenerationResult, stats: bool, as_json: bool) -> None:
    from kvrelay.cli.answer_report import result_as_json, summary_lines

    print(json.dumps(result_as_json(result)) if as_json else "")
    if stats:
        print("\n".join(summary_lines(result)), file=sys.stderr)
