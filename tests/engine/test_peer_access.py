"""Which pairs of GPUs may share a KV cache."""

from __future__ import annotations

import pytest
import torch

from kvrelay.core.errors import ConfigError
from kvrelay.engine.cuda.peer_access import enable_peer_access

GPUS = [torch.device("cuda", index) for index in range(3)]


def test_gpus_that_can_not_reach_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, two: False)
    with pytest.raises(ConfigError, match="cuda:0 can't access the memory of cuda:2"):
        enable_peer_access(GPUS[0], [GPUS[0], GPUS[2]])


def test_one_device_and_cpus_need_no_access() -> None:
    enable_peer_access(GPUS[0], [])
    enable_peer_access(GPUS[0], [GPUS[0]])
    enable_peer_access(torch.device("cpu"), [torch.device("cpu")])
