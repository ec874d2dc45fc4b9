"""Behind which sum or meeting of the ranks KV is announced and blocks count as moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvrelay.core.ids import BlockId
from kvrelay.engine.attention import Span
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.device import CpuDevice
from kvrelay.engine.forward_pass import StepInputs
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.model.parallel import Shard
from kvrelay.engine.torch_rank import TorchRank, plan_engine

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "eos_token_id": 2,
}


class RecordingCollectives:
    """Rank 0 of two, whose other rank never adds anything; what is called is written into `events`."""

    shard = Shard(0, 2)

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.at_meeting: Any = None

    def all_reduce(self, rows: Tensor) -> Tensor:
        self.events.append("sum")
        return rows

    def all_gather(self, rows: Tensor) -> Tensor:
        self.events.append("gather")
        return torch.stack([rows, rows])

    def barrier(self) -> None:
        self.events.append("meet")
        if self.at_meeting is not None:
            self.at_meeting()


@pytest.fixture
def collectives() -> RecordingCollectives:
    return RecordingCollectives()


@pytest.fixture
def rank(tmp_path: Path, collectives: RecordingCollectives) -> TorchRank:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    config = EngineConfig(
        str(tmp_path), random_weights=True, num_blocks=8, host_kv_bytes=1 << 20, tensor_parallel_size=2
    )
    return TorchRank(plan_engine(config), CpuDevice(), collectives)


def run(rank: TorchRank, collectives: RecordingCollectives, sampled_rows: list[int]) -> list[Any]:
    inputs = StepInputs(
        np.array([5, 6, 7], dtype=np.int64),
        np.arange(3),
        np.array(sampled_rows, dtype=np.int64),
        (Span([BlockId(0)], 0, 3),),
    )
    with torch.inference_mode():
        rank.forward_pass.run(inputs, collectives.events.append)
    return collectives.events


def test_a_layer_is_announced_behind_the_sum_that_follows_its_attention(
    rank: TorchRank, collectives: RecordingCollectives
) -> None:
    assert run(rank, collectives, [2]) == ["sum", 0, "sum", "sum", 1, "sum", "gather"]


def test_the_last_layer_of_a_step_that_samples_nothing_is_announced_behind_a_meeting(
    rank: TorchRank, collectives: RecordingCollectives
) -> None:
    assert run(rank, collectives, []) == ["sum", 0, "sum", "meet", 1]


def test_ranks_meet_behind_each_move_of_blocks(rank: TorchRank, collectives: RecordingCollectives) -> None:
    assert rank.mover is not None
    with torch.inference_mode():
        rank.cache[:, :, 3] = 1.5
    rank.mover.move([BlockCopy(BlockId(3), 0, to_host=True)])
    seen: list[float] = []
    collectives.at_meeting = lambda: seen.append(float(rank.cache[:, :, 5].mean()))
    rank.mover.move([BlockCopy(BlockId(5), 0, to_host=False)])
    assert seen == [1.5]
    assert collectives.events == ["meet", "meet"]
