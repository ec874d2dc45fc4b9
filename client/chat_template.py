"""Chat messages into one prompt text, by the model's own Jinja template.

The template comes from a node of the cluster, hence the sandbox and the bounds.
Source: the chat template section of the Hugging Face transformers documentation, for what templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, NoReturn, TypedDict, Unpack

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvrelay.core.errors import InvalidRequest, KVRelayError

MAX_TEMPLATE_CHARS: Final = 1 << 20
MAX_RENDERED_CHARS: Final = 32 << 20
_TEMPLATE_FAULTS: Final = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class RenderOptions(TypedDict, total=False):
    """What a template gets beside the messages; see `ChatTemplate.render`."""

    tools: Sequence[Mapping[str, object]] | None
    add_generation_prompt: bool
    variables: Mapping[str, object] | None


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's part for training; here it just shows its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. `special_tokens` (``bos_token``, ``eos_token``, ...) are its variables.

    Raises:
        KVRelayError: the template itself is broken.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise KVRelayError(f"the model's chat template is longer than {MAX_TEMPLATE_CHARS} characters")
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise KVRelayError(f"the model's chat template can't be read: {error}") from error

    def render(self, messages: Sequence[Mapping[str, object]], **options: Unpack[RenderOptions]) -> str:
        """The prompt; with ``add_generation_prompt``, the default, it ends where the assistant is to speak.

        Raises:
            InvalidRequest: the template refuses these messages; `field` is ``messages``.
        """
        values = {
            **self._special_tokens,
            **(options.get("variables") or {}),
            "messages": [dict(message) for message in messages],
            "tools": options.get("tools"),
            "add_generation_prompt": options.get("add_generation_prompt", True),
        }
        try:
            text = self._render(values)
            text.encode()  # fails where a tool's text has half a surrogate pair, which can't be tokenized
            return text
        # A template may do anything with what it is given; whatever it trips over is these messages.
        except _TEMPLATE_FAULTS as error:
            raise InvalidRequest(
                f"messages do not fit the model's chat template: {error}", field="messages"
            ) from error

    def _render(self, values: Mapping[str, object]) -> str:
        parts: list[str] = []
        num_chars = 0
        for part in self._template.generate(values):
            parts.append(part)
            num_chars += len(part)
            if num_chars > MAX_RENDERED_CHARS:
                raise ValueError(f"the prompt is longer than {MAX_RENDERED_CHARS} characters")
        return "".join(parts)


def check_template_inputs(
    tools: Sequence[Mapping[str, object]] | None,
    template_variables: Mapping[str, object] | None,
    *,
    max_tools: int,
) -> None:
    """What a chat template gets beside messages: a bounded number of mappings; values by name. Raises,
    naming the field."""
    if tools is not None and len(tools) > max_tools:
        raise InvalidRequest(f"tools has {len(tools)} entries, at most {max_tools}", field="tools")
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise InvalidRequest(f"tools[{index}] must be a mapping", field=f"tools[{index}]")
    if template_variables is not None and not (
        isinstance(template_variables, Mapping) and all(isinstance(name, str) for name in template_variables)
    ):
        raise InvalidRequest("template_variables must map names to values", field="template_variables")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # templates may name the argument
    return datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own tojson escapes HTML, which a prompt must not have.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
