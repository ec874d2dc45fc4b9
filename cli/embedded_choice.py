"""The model called ``smollm2``: resolved to the folder of the embedded one, made when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from kvrelay.cli.config_file import DEFAULT_MODEL
from kvrelay.engine.config import EngineConfig, EngineKind

EMBEDDED_NAME: Final = "smollm2-135m-instruct"
"""What the embedded model is served as, unless the configuration says otherwise."""


def is_embedded(config: EngineConfig) -> bool:
    """Whether `config` asks for the embedded model by its short name."""
    return config.engine == EngineKind.TORCH and config.model == DEFAULT_MODEL


def with_embedded_model(
    config: EngineConfig, on_progress: Callable[[float, str], None] | None = None
) -> EngineConfig:
    """`config` with a folder in place of ``smollm2``, as model and as tokenizer; others are left as they are.

    Raises:
        ConfigError: the embedded model can't be had.
    """
    if not is_embedded(config) and config.tokenizer != DEFAULT_MODEL:
        return config
    from kvrelay.engine.embedded_model import ensure_smollm2

    folder = str(ensure_smollm2(on_progress=on_progress))
    if config.tokenizer == DEFAULT_MODEL:
        config = replace(config, tokenizer=folder)
    if not is_embedded(config):
        return config
    return replace(config, model=folder, served_name=config.served_name or EMBEDDED_NAME)
