"""Who may ask, and how much: API keys, hashed at rest, with limits that hold over all workers."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvrelay.core.errors import ConfigError
from kvrelay.core.service_terms import Priority
from kvrelay.openai_proxy.errors import ApiError
from kvrelay.openai_proxy.usage_board import UsageBoard

logger = logging.getLogger(__name__)

KEY_PREFIX: Final = "kvr-"
MAX_KEYS: Final = 4096
MAX_KEYS_FILE_BYTES: Final = 4 << 20
WINDOW_S: Final = 60
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_SETTINGS: Final = {"name", "sha256", "max_concurrent", "tokens_per_minute", "private_cache", "max_priority"}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key: its name, and the SHA-256 of its text (it is 256 random bits, so no slow hash is needed).

    `max_concurrent` requests at once and `tokens_per_minute`, prompt and output together; 0: no limit.
    With `private_cache` its prompts share cached prefixes with nobody else's. What asks for more than
    `max_priority` gets that.
    """

    name: str
    sha256: str
    max_concurrent: int = 0
    tokens_per_minute: int = 0
    private_cache: bool = False
    max_priority: str = Priority.HIGH


def new_key() -> str:
    """The text of a new key."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(text: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file: TOML, one ``[[key]]`` each.

    Raises:
        ConfigError: with all faults, one a line.
    """
    try:
        if path.stat().st_size > MAX_KEYS_FILE_BYTES:
            raise ConfigError(f"keys_file {path} is over {MAX_KEYS_FILE_BYTES} bytes", field="keys_file")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"keys_file {path} can't be read: {error}", field="keys_file") from error
    return parse_keys(text, str(path))


def parse_keys(text: str, source: str) -> tuple[ApiKey, ...]:
    """The keys of a file's text; `source` names it in errors.

    Raises:
        ConfigError: with all faults, one a line.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"keys_file {source} is not TOML: {error}", field="keys_file") from error
    faults = [f"{name!r} is not known; the file holds [[key]] tables" for name in document if name != "key"]
    entries = document.get("key", [])
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        faults.append(f"key must be at most {MAX_KEYS} [[key]] tables")
        entries = []
    keys: list[ApiKey] = []
    for number, entry in enumerate(entries, 1):
        found = _key_faults(entry)
        faults += [f"key {number}: {fault}" for fault in found]
        keys += [] if found else [ApiKey(**entry)]
    for what in ("name", "sha256"):
        values = [getattr(key, what) for key in keys]
        doubles = sorted({value for value in values if values.count(value) > 1})
        faults += [f"two keys have the {what} {value!r}" for value in doubles]
    if faults:
        raise ConfigError("\n".join(f"{source}: {fault}" for fault in faults), field="keys_file")
    return tuple(keys)


def _key_faults(entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return ["must be a table"]
    faults = [f"{name} is not a setting" for name in entry if name not in _SETTINGS]
    for what, pattern in (("name", _NAME), ("sha256", _HASH)):
        value = entry.get(what)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            faults.append(f"{what} must match {pattern.pattern}")
    for what in ("max_concurrent", "tokens_per_minute"):
        value = entry.get(what, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            faults.append(f"{what} must be an integer of at least 0, got {value!r}")
    if not isinstance(entry.get("private_cache", False), bool):
        faults.append("private_cache must be true or false")
    if entry.get("max_priority", Priority.HIGH) not in tuple(Priority):
        faults.append(f"max_priority must be one of {', '.join(Priority)}, got {entry['max_priority']!r}")
    return faults


class Grant:
    """What one request's key allows. Made by `Access.admit`; `release` it when the request is over."""

    def __init__(self, access: Access | None = None, number: int = 0, key: ApiKey | None = None) -> None:
        self._access = access
        self._number = number
        self._key = key
        self._is_held = access is not None
        self._counters: list[Callable[[], int]] = []

    @property
    def name(self) -> str:
        """Of the key; empty where none is asked for."""
        return self._key.name if self._key else ""

    def priority(self, wanted: Priority) -> Priority:
        """What it is served with."""
        most = Priority(self._key.max_priority) if self._key else Priority.HIGH
        return max(wanted, most, key=tuple(Priority).index)

    def cache_salt(self, given: str) -> bytes:
        """Under what its prompts share cached prefixes."""
        if self._key is None or not self._key.private_cache:
            return given.encode()
        return hashlib.sha256(f"{self._key.sha256}\0{given}".encode()).digest()

    def charge(self, num_tokens: int) -> None:
        """Count tokens against the key's minute."""
        if self._access is not None:
            self._access.charge(self._number, num_tokens)

    def count_at_end(self, num_tokens: Callable[[], int]) -> None:
        """Charge, on release, what `num_tokens` says then."""
        self._counters.append(num_tokens)

    def release(self) -> None:
        """The request is over; once is enough."""
        if self._access is not None and self._is_held:
            self._is_held = False
            self.charge(sum(count() for count in self._counters))
            self._access.leave(self._number)


class Access:
    """Admits requests by their key. `board` holds the counts, shared with the other workers; `now_s` is Unix
    time. No keys: everybody is admitted."""

    def __init__(
        self, keys: Sequence[ApiKey], board: UsageBoard, now_s: Callable[[], float] = time.time
    ) -> None:
        self._keys = tuple(keys)
        self._number_of_hash = {key.sha256: number for number, key in enumerate(keys)}
        self._board = board
        self._now_s = now_s

    def admit(self, headers: Mapping[str, str]) -> Grant:
        """Let a request in, and count it until its grant is released.

        Raises:
            ApiError: 401, no such key; 429, its limit is reached.
        """
        if not self._keys:
            return Grant()
        number = self._find(headers.get("authorization", ""))
        key = self._keys[number]
        self._check_tokens(number, key)
        if self._board.enter(number) > key.max_concurrent > 0:
            self._board.leave(number)
            logger.info("key=%s refused: max_concurrent", key.name)
            raise ApiError(
                429,
                f"key {key.name!r} has {key.max_concurrent} requests under way, which is its limit",
                code="rate_limit_exceeded",
                retry_after_s=1.0,
            )
        return Grant(self, number, key)

    def charge(self, number: int, num_tokens: int) -> None:
        """Count tokens of a key."""
        self._board.add_tokens(number, self._window(), num_tokens)

    def leave(self, number: int) -> None:
        """A request of a key is over."""
        self._board.leave(number)

    def _find(self, authorization: str) -> int:
        scheme, _, text = authorization.partition(" ")
        number = self._number_of_hash.get(hash_key(text.strip())) if scheme.lower() == "bearer" else None
        if number is None or not hmac.compare_digest(self._keys[number].sha256, hash_key(text.strip())):
            why = "the API key is not known" if authorization else "no API key was given"
            raise ApiError(401, f"{why}; send it as Authorization: Bearer …", code="invalid_api_key")
        return number

    def _check_tokens(self, number: int, key: ApiKey) -> None:
        if not key.tokens_per_minute:
            return
        now_s = self._now_s()
        if self._board.tokens(number, int(now_s // WINDOW_S)) >= key.tokens_per_minute:
            logger.info("key=%s refused: tokens_per_minute", key.name)
            raise ApiError(
                429,
                f"key {key.name!r} has used its {key.tokens_per_minute} tokens of this minute",
                code="rate_limit_exceeded",
                retry_after_s=WINDOW_S - now_s % WINDOW_S,
            )

    def _window(self) -> int:
        return int(self._now_s() // WINDOW_S)


def key_as_toml(key: ApiKey) -> str:
    """One ``[[key]]`` table of a keys file."""
    values: dict[str, Any] = {
        "name": f'"{key.name}"',
        "sha256": f'"{key.sha256}"',
        "max_concurrent": key.max_concurrent,
        "tokens_per_minute": key.tokens_per_minute,
        "private_cache": str(key.private_cache).lower(),
        "max_priority": f'"{key.max_priority}"',
    }
    return "[[key]]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())
