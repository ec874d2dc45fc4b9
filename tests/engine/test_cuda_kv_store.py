"""The store of KV in GPU memory, its arithmetic on CPU tensors: the same bytes as the host's store moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch

from kvrelay.core.errors import ConfigError
from kvrelay.core.kv import DeviceKind, KVLayout
from kvrelay.engine.cuda.copy_kernels import IndexCopier, RowShape, TokenRows, TritonCopier, choose_copier
from kvrelay.engine.cuda.copy_stream import PASSED, CopyEnd, InlineCopyStream
from kvrelay.engine.cuda.kv_store import CudaKVStore
from kvrelay.engine.cuda.staging import CudaStaging
from kvrelay.engine.host_kv import HostKVStore

CPU = torch.device("cpu")


def layout_of(block_size: int = 4, head_dim: int = 8, dtype: str = "bfloat16") -> KVLayout:
    return KVLayout(3, 24, block_size, 2, head_dim, dtype, 2)


def random_cache(layout: KVLayout, seed: int = 0) -> torch.Tensor:
    shape = (layout.num_layers, 2, layout.num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)


def stores(layout: KVLayout, seed: int = 0) -> tuple[CudaKVStore, HostKVStore]:
    """Over two caches of equal content."""
    cache = random_cache(layout, seed)
    host_bytes = (
        cache.clone().view(torch.uint8).view(layout.num_layers, 2, -1, layout.token_bytes_per_layer // 2)
    )
    return CudaKVStore(layout, [cache]), HostKVStore(layout, host_bytes.numpy())


def shuffled_table(layout: KVLayout, num_blocks: int, seed: int = 1) -> tuple[Any, ...]:
    return tuple(np.random.default_rng(seed).permutation(layout.num_blocks)[:num_blocks].tolist())


RANGES = [
    (range(3), range(80)),
    (range(1, 2), range(3, 4)),
    (range(2), range(7, 31)),
    (range(2, 3), range(4, 8)),
    (range(1, 3), range(5, 77)),
]


@pytest.mark.parametrize(("layers", "tokens"), RANGES)
@pytest.mark.parametrize("block_size", [1, 4, 5])
def test_gather_gives_the_bytes_that_the_host_store_gives(
    layers: range, tokens: range, block_size: int
) -> None:
    layout = layout_of(block_size)
    tokens = range(tokens.start * block_size // 5, tokens.stop * block_size // 5 + 1)
    store, host = stores(layout)
    table = shuffled_table(layout, 20)
    size = len(layers) * len(tokens) * layout.token_bytes_per_layer
    mine, theirs = store.allocate_staging(size + 48), host.allocate_staging(size + 48)
    assert store.gather(table, layers, tokens, mine, 32).wait() == size
    assert host.gather(table, layers, tokens, theirs, 32).wait() == size
    assert bytes(mine.host_view()) == bytes(theirs.host_view())


@pytest.mark.parametrize(("layers", "tokens"), RANGES)
@pytest.mark.parametrize("offset", [0, 1, 2, 12, 64])
def test_scatter_changes_what_the_host_store_changes(layers: range, tokens: range, offset: int) -> None:
    layout = layout_of()
    cache = random_cache(layout)
    host_cache = cache.clone().view(torch.uint8).view(3, 2, -1, layout.token_bytes_per_layer // 2).numpy()
    store, host = CudaKVStore(layout, [cache]), HostKVStore(layout, host_cache)
    table = shuffled_table(layout, 20)
    size = len(layers) * len(tokens) * layout.token_bytes_per_layer
    message = np.random.default_rng(3).bytes(size)
    mine, theirs = store.allocate_staging(size + offset), host.allocate_staging(size + offset)
    mine.host_view()[offset:] = message
    theirs.host_view()[offset:] = message
    assert store.scatter(table, layers, tokens, mine, offset).wait() == size
    assert host.scatter(table, layers, tokens, theirs, offset).wait() == size
    assert cache.view(torch.uint8).numpy().tobytes() == host_cache.tobytes()


def test_rows_of_an_odd_number_of_bytes_are_copied_too() -> None:
    layout = KVLayout(3, 24, 4, 1, 3, "float8", 1)
    cache = torch.randint(0, 255, (3, 2, 24, 4, 1, 3), dtype=torch.uint8)
    store, host = CudaKVStore(layout, [cache]), HostKVStore(layout, cache.clone().view(3, 2, -1, 3).numpy())
    table = shuffled_table(layout, 20)
    mine, theirs = store.allocate_staging(4096), host.allocate_staging(4096)
    num_bytes = host.gather(table, range(3), range(2, 79), theirs, 5).wait()
    assert store.gather(table, range(3), range(2, 79), mine, 5).wait() == num_bytes
    assert bytes(mine.host_view()) == bytes(theirs.host_view())


def test_more_tokens_than_the_first_slot_list_holds() -> None:
    layout = KVLayout(1, 700, 16, 1, 2, "bfloat16", 2)
    cache = torch.randint(0, 2**15, (1, 2, 700, 16, 1, 2), dtype=torch.int16).view(torch.bfloat16)
    store, host = (
        CudaKVStore(layout, [cache]),
        HostKVStore(layout, cache.view(torch.uint8).view(1, 2, -1, 4).numpy()),
    )
    table = shuffled_table(layout, 700)
    for tokens in (range(10), range(3, 11_100), range(5, 6)):
        size = len(tokens) * layout.token_bytes
        mine, theirs = store.allocate_staging(size), host.allocate_staging(size)
        store.gather(table, range(1), tokens, mine, 0)
        host.gather(table, range(1), tokens, theirs, 0)
        assert bytes(mine.host_view()) == bytes(theirs.host_view())


def test_a_cache_made_in_inference_mode_is_written() -> None:
    layout = layout_of()
    with torch.inference_mode():
        cache = torch.zeros(3, 2, 24, 4, 2, 8, dtype=torch.bfloat16)
    store = CudaKVStore(layout, [cache])
    staging = store.allocate_staging(layout.token_bytes)
    staging.host_view()[:] = b"\1" * layout.token_bytes
    store.scatter((5,), range(3), range(2, 3), staging, 0)
    assert bool(cache[:, :, 5, 2].all())
    assert int(cache.count_nonzero()) == 3 * 2 * 2 * 8


@pytest.mark.parametrize("table", [(0, 24), (0, -1), (0,)])
def test_slots_outside_of_the_cache_are_a_bug_and_reach_no_kernel(table: tuple[Any, ...]) -> None:
    store, _ = stores(layout_of())
    staging = store.allocate_staging(1 << 16)
    with pytest.raises(AssertionError):
        store.gather(table, range(3), range(8), staging, 0)


def test_expandable_segments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.8, expandable_segments: True"
    )
    with pytest.raises(ConfigError, match="expandable_segments"):
        CudaStaging(4096, CPU)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    assert CudaStaging(4096, CPU).device_kind is DeviceKind.CPU


class RecordingStream:
    """Writes down what a copy waits for and when it is done."""

    def __init__(self) -> None:
        self.num_marks = 0
        self.passed: set[int] = set()
        self.waited: list[set[int]] = []
        self.is_copying = False

    def adopt_thread(self) -> None:
        return

    def mark(self) -> int:
        self.num_marks += 1
        return self.num_marks

    def has_passed(self, mark: int) -> bool:
        return mark in self.passed

    def run(self, copy: Callable[[], None], after: Iterable[int]) -> CopyEnd:
        self.waited.append(set(after))
        self.is_copying = True
        copy()
        self.is_copying = False
        return PASSED

    def settle(self) -> None:
        return


class RecordingCopier(IndexCopier):
    def __init__(self, stream: RecordingStream) -> None:
        self.stream = stream

    def gather(self, planes: torch.Tensor, rows: TokenRows, message: torch.Tensor) -> None:
        assert self.stream.is_copying, "a gather outside of the store's stream"
        super().gather(planes, rows, message)

    def scatter(self, planes: torch.Tensor, rows: TokenRows, message: torch.Tensor) -> None:
        assert self.stream.is_copying, "a scatter outside of the store's stream"
        super().scatter(planes, rows, message)


@pytest.fixture
def recording() -> tuple[CudaKVStore, RecordingStream]:
    stream = RecordingStream()
    store = CudaKVStore(
        layout_of(), [random_cache(layout_of())], copier=RecordingCopier(stream), streams=[stream]
    )
    return store, stream


def test_a_gather_waits_for_the_latest_writes_of_its_layers_alone(
    recording: tuple[CudaKVStore, RecordingStream],
) -> None:
    store, stream = recording
    staging = store.allocate_staging(1 << 16)
    for layers in (range(3), range(2), range(2, 3), range(1, 3)):
        store.gather((0, 1), layers, range(8), staging, 0)
        if layers == range(3):
            store.mark_written(range(0, 2))  # 1
            store.mark_written(range(2, 3))  # 2
    store.mark_written()  # 3
    store.gather((0, 1), range(3), range(8), staging, 0)
    assert stream.waited == [set(), {1}, {2}, {1, 2}, {3}]


def test_a_mark_that_the_device_has_passed_is_not_waited_for(
    recording: tuple[CudaKVStore, RecordingStream],
) -> None:
    store, stream = recording
    staging = store.allocate_staging(1 << 16)
    store.mark_written(range(0, 2))  # 1
    store.mark_written(range(2, 3))  # 2
    store.mark_freed()  # 3
    stream.passed = {1, 3}
    store.gather((0, 1), range(3), range(8), staging, 0)
    store.scatter((0, 1), range(3), range(8), staging, 0)
    store.mark_written(range(1, 2))  # 4
    store.gather((0, 1), range(2), range(8), staging, 0)
    assert stream.waited == [{2}, set(), {4}]


def test_a_scatter_waits_for_the_work_before_its_blocks_were_freed(
    recording: tuple[CudaKVStore, RecordingStream],
) -> None:
    store, stream = recording
    staging = store.allocate_staging(1 << 16)
    store.mark_written()  # 1: a prefill beside it delays no scatter
    store.scatter((0, 1), range(3), range(8), staging, 0)
    store.mark_freed()  # 2
    store.scatter((0, 1), range(3), range(8), staging, 0)
    assert stream.waited == [set(), {2}]


def test_the_cpu_gets_torchs_indexing() -> None:
    assert choose_copier(CPU, RowShape(256, 256, torch.int64, 16)).name == "index_select"


SHARDS = [1, 2, 4]


def sharded(layout: KVLayout, cache: torch.Tensor, num_shards: int) -> tuple[list[torch.Tensor], CudaKVStore]:
    """Copies of the cache's heads in as many parts, and a store over them."""
    shards = [part.contiguous() for part in cache.clone().chunk(num_shards, dim=4)]
    return shards, CudaKVStore(layout, shards)


def four_heads() -> tuple[KVLayout, torch.Tensor]:
    layout = KVLayout(3, 24, 4, 4, 6, "bfloat16", 2)
    generator = torch.Generator().manual_seed(4)
    cache = torch.randint(-(2**15), 2**15, (3, 2, 24, 4, 4, 6), dtype=torch.int16, generator=generator)
    return layout, cache.view(torch.bfloat16)


@pytest.mark.parametrize("num_shards", SHARDS)
@pytest.mark.parametrize(("layers", "tokens"), RANGES)
def test_shards_make_the_message_that_the_whole_cache_makes(
    num_shards: int, layers: range, tokens: range
) -> None:
    layout, cache = four_heads()
    _, store = sharded(layout, cache, num_shards)
    host = HostKVStore(layout, cache.view(torch.uint8).view(3, 2, -1, 48).numpy())
    table = shuffled_table(layout, 20)
    mine, theirs = store.allocate_staging(1 << 16), host.allocate_staging(1 << 16)
    num_bytes = host.gather(table, layers, tokens, theirs, 12).wait()
    assert store.gather(table, layers, tokens, mine, 12).wait() == num_bytes
    assert bytes(mine.host_view()) == bytes(theirs.host_view())


@pytest.mark.parametrize("num_sending", SHARDS)
@pytest.mark.parametrize("num_receiving", SHARDS)
def test_messages_pass_between_stores_of_different_shards(num_sending: int, num_receiving: int) -> None:
    layout, cache = four_heads()
    _, sender = sharded(layout, cache, num_sending)
    received, receiver = sharded(layout, torch.zeros_like(cache), num_receiving)
    source, target = shuffled_table(layout, 20), shuffled_table(layout, 20, seed=2)
    staging = sender.allocate_staging(1 << 16)
    for layers, tokens in ((range(2), range(80)), (range(2, 3), range(33)), (range(2, 3), range(33, 80))):
        sender.gather(source, layers, tokens, staging, 8).wait()
        receiver.scatter(target, layers, tokens, staging, 8).wait()
    whole = torch.cat(received, dim=4).view(torch.int16)
    assert torch.equal(whole[:, :, list(target)], cache.view(torch.int16)[:, :, list(source)])
    unused = [block for block in range(layout.num_blocks) if block not in target]
    assert not whole[:, :, unused].any()


class LateStream(InlineCopyStream):
    """Its copies end when the test says so."""

    def __init__(self) -> None:
        self.is_over = False

    def run(self, copy: Callable[[], None], after: Iterable[int]) -> CopyEnd:
        copy()
        return self

    def is_done(self) -> bool:
        return self.is_over

    def wait(self) -> None:
        self.is_over = True


def test_a_copy_is_done_when_that_of_every_shard_is() -> None:
    layout, cache = four_heads()
    streams = [LateStream(), LateStream()]
    shards = [part.contiguous() for part in cache.chunk(2, dim=4)]
    store = CudaKVStore(layout, shards, streams=streams)
    staging = store.allocate_staging(1 << 16)
    copy = store.gather((0, 1), range(3), range(8), staging, 0)
    assert not copy.is_done()
    streams[0].is_over = True
    assert not copy.is_done()
    streams[1].is_over = True
    assert copy.is_done()
    for stream in streams:
        stream.is_over = False
    assert copy.wait() == 8 * layout.token_bytes
    assert streams[0].is_over
    assert streams[1].is_over


def test_more_block_tables_than_are_remembered() -> None:
    store, host = stores(layout_of())
    mine, theirs = store.allocate_staging(1 << 12), host.allocate_staging(1 << 12)
    for seed in [*range(40), 0, 1]:
        table = shuffled_table(layout_of(), 3, seed)
        store.gather(table, range(3), range(1, 11), mine, 0).wait()
        host.gather(table, range(3), range(1, 11), theirs, 0).wait()
        assert bytes(mine.host_view()) == bytes(theirs.host_view())


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_triton_kernel_copies_the_same_rows(monkeypatch: pytest.MonkeyPatch, num_shards: int) -> None:
    """In Triton's interpreter, where Triton is installed."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    layout = KVLayout(2, 24, 4, 3, 10, "bfloat16", 2)
    cache = torch.randint(0, 2**15, (2, 2, 24, 4, 3, 10), dtype=torch.int16).view(torch.bfloat16)
    shards = [part.contiguous() for part in cache.clone().chunk(num_shards, dim=4)]
    indexed, kernel = CudaKVStore(layout, [cache]), CudaKVStore(layout, shards, copier=TritonCopier())
    table = shuffled_table(layout, 20)
    for layers, tokens, offset in ((range(2), range(80), 0), (range(1, 2), range(3, 40), 6)):
        mine, theirs = kernel.allocate_staging(1 << 16), indexed.allocate_staging(1 << 16)
        num_bytes = indexed.gather(table, layers, tokens, theirs, offset).wait()
        assert kernel.gather(table, layers, tokens, mine, offset).wait() == num_bytes
        assert torch.equal(mine.bytes, theirs.bytes)
        mine.bytes.random_()
        theirs.bytes.copy_(mine.bytes)
        kernel.scatter(table, layers, tokens, mine, offset).wait()
        indexed.scatter(table, layers, tokens, theirs, offset).wait()
        assert torch.equal(torch.cat(shards, dim=4).view(torch.int16), cache.view(torch.int16))
