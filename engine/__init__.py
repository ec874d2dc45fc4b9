"""What a node runs: the `Engine` protocol, the paged-KV `torch` engine and the model-free `sim` engine.

Importing this package imports neither torch nor numpy; `load_engine` imports what its engine needs.
"""

from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.factory import load_engine
from kvrelay.engine.interface import Engine

__all__ = ["Engine", "EngineConfig", "EngineKind", "load_engine"]
