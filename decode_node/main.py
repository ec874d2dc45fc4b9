"""Runs a decode node."""

from __future__ import annotations

from kvrelay.core.errors import ConfigError
from kvrelay.core.node_messages import Role
from kvrelay.decode_node.core import DecodeNodeCore
from kvrelay.node.config import NodeConfig
from kvrelay.node.run_node import run_node


def run_decode_node(config: NodeConfig) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status (see `run_node`).

    Raises:
        ConfigError: the configuration is another role's.
    """
    if config.role is not Role.DECODE:
        raise ConfigError(f"role must be {Role.DECODE.value!r}, got {config.role.value!r}")
    return run_node(config, DecodeNodeCore)
