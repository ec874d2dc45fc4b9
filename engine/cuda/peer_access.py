"""Letting GPUs of one host read and write each other's memory from kernels of this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrelay.core.errors import ConfigError


def enable_peer_access(first: torch.device, others: Sequence[torch.device]) -> None:
    """Both ways between `first` and each of `others`; what is the same device or no GPU needs none.

    Raises:
        ConfigError: naming two devices that can't reach each other.
    """
    for other in others:
        if other.type != "cuda" or other == first:
            continue
        for one, two in ((first, other), (other, first)):
            if not torch.cuda.can_device_access_peer(one, two):
                raise ConfigError(
                    f"{one} can't access the memory of {two}: GPUs that share a KV cache must be peers"
                )
            # PyTorch enables the access of a pair of devices when it first copies between them.
            torch.zeros(1, device=two).copy_(torch.zeros(1, device=one))
        torch.cuda.synchronize(other)
