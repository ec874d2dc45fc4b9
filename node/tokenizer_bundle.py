"""The tokenizer bundle: what a client needs to turn text into this model's token ids and back.

zlib-compressed JSON with the keys "tokenizer" (tokenizer.json as an object), "chat_template" (Jinja source,
empty if the model has none) and "special_tokens" ("bos_token" and "eos_token", null if there is none).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.core.tokenizer_chunk import MAX_TOKENIZER_BYTES

SPECIAL_TOKENS: Final = ("bos_token", "eos_token")


def build_tokenizer_bundle(model_dir: Path) -> bytes | None:
    """The compressed bundle of a Hugging Face model folder; None if that has no tokenizer.json.

    Equal folders give equal bytes.

    Raises:
        ConfigError: a file is not JSON, or the bundle is larger than `MAX_TOKENIZER_BYTES`.
    """
    tokenizer_file = model_dir / "tokenizer.json"
    if not tokenizer_file.is_file():
        return None
    config = _read_object(model_dir / "tokenizer_config.json")
    bundle = {
        "tokenizer": _read_object(tokenizer_file),
        "chat_template": _chat_template(model_dir, config),
        "special_tokens": {name: _token_text(config.get(name)) for name in SPECIAL_TOKENS},
    }
    text = json.dumps(bundle, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    data = zlib.compress(text.encode(), level=6)
    if len(data) > MAX_TOKENIZER_BYTES:
        raise ConfigError(
            f"the tokenizer bundle of {model_dir} has {len(data)} bytes, at most {MAX_TOKENIZER_BYTES}"
        )
    return data


def _read_object(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return content


def _chat_template(model_dir: Path, config: dict[str, object]) -> str:
    """The folder's own file goes before the entry in tokenizer_config.json, as newer models have it."""
    template_file = model_dir / "chat_template.jinja"
    if template_file.is_file():
        return template_file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {
            str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else ""


def _token_text(token: object) -> str | None:
    """A special token is written as text, or as an object with its text in "content"."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
