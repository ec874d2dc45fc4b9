"""Options of `kvrelay generate`, grouped as `--help` shows them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from kvrelay.core.sampling import Grammar

_SAMPLING: Final = "Sampling"
_PROMPT: Final = "Prompt"


def _sampling_option(flag: str, metavar: str, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel=_SAMPLING)


ModelName = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME", help="Default: the only model that is served.")
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Send the prompt without chat template.", rich_help_panel=_PROMPT)
]
System = Annotated[
    str, typer.Option("--system", metavar="TEXT", help="System message.", rich_help_panel=_PROMPT)
]
TokenIds = Annotated[
    bool,
    typer.Option(
        "--token-ids",
        help="PROMPT is token ids (1,2,3), and so is the answer.",
        rich_help_panel=_PROMPT,
    ),
]
MaxTokens = Annotated[int | None, _sampling_option("--max-tokens", "N", "Default: 256.")]
Temperature = Annotated[float | None, _sampling_option("--temperature", "T", "Default: 0, greedy.")]
TopK = Annotated[int | None, _sampling_option("--top-k", "K", "Default: 0, off.")]
TopP = Annotated[float | None, _sampling_option("--top-p", "P", "Default: 1, off.")]
MinP = Annotated[float | None, _sampling_option("--min-p", "P", "Default: 0, off.")]
RepetitionPenalty = Annotated[float | None, _sampling_option("--repetition-penalty", "X", "Default: 1, off.")]
PresencePenalty = Annotated[float | None, _sampling_option("--presence-penalty", "X", "Default: 0, off.")]
FrequencyPenalty = Annotated[float | None, _sampling_option("--frequency-penalty", "X", "Default: 0, off.")]
Seed = Annotated[int | None, _sampling_option("--seed", "N", "Default: drawn.")]
StopTokenIds = Annotated[
    list[int] | None, _sampling_option("--stop-token-id", "ID", "Stop there too. Repeatable.")
]
IgnoreEos = Annotated[bool, _sampling_option("--ignore-eos", "", "Go on after an end-of-sequence token.")]
Logprobs = Annotated[
    int | None,
    _sampling_option("--logprobs", "K", "Log-probabilities of the K likeliest tokens, for --json."),
]
MinTokens = Annotated[int | None, _sampling_option("--min-tokens", "N", "Do not end before. Default: 0.")]
JsonSchema = Annotated[
    Path | None, _sampling_option("--json-schema", "FILE", "The answer is JSON that this schema allows.")
]
Regex = Annotated[str | None, _sampling_option("--regex", "REGEX", "The whole answer matches it.")]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", help="Give up after that long. Default: the router's."),
]
TtftTimeout = Annotated[
    float | None,
    typer.Option("--ttft-timeout", metavar="SECONDS", help="Refuse it if its first token would be later."),
]
PriorityName = Annotated[
    str, typer.Option("--priority", metavar="CLASS", help="high, normal or low, in the routers' queues.")
]
Tenant = Annotated[
    str, typer.Option("--tenant", metavar="NAME", help="Who shares fairly with others. Default: nobody's.")
]
RequestIdText = Annotated[
    str, typer.Option("--request-id", metavar="ID", help="How the router's logs call it. Default: drawn.")
]
Stats = Annotated[bool, typer.Option("--stats", help="Print placement and timings to stderr.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of the text.")]


def grammar_of(json_schema: Path | None, regex: str | None) -> Grammar | None:
    """The grammar that the options ask for.

    Raises:
        InvalidRequest: both are given, or the file can't be read.
    """
    from kvrelay.core.errors import InvalidRequest
    from kvrelay.core.sampling import Grammar, GrammarKind

    if json_schema is None:
        return None if regex is None else Grammar(GrammarKind.REGEX, regex)
    if regex is not None:
        raise InvalidRequest("give either --json-schema or --regex", field="--regex")
    try:
        return Grammar(GrammarKind.JSON_SCHEMA, json_schema.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--json-schema can't be read: {error}", field="--json-schema") from error
