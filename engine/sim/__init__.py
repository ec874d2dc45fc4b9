"""An engine without a model: the real scheduler and block pool, modelled time, deterministic tokens."""
