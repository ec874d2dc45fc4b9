"""Which launches may go to a kernel that is compiled already, and which must ask Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvrelay.engine.cuda import compiled_launch
from kvrelay.engine.cuda.compiled_launch import CompiledLaunch

GRID = (3, 1, 1)
STREAM = 77


class Compiled:
    """As Triton's: called with everything in the order of the kernel's parameters."""

    function = 5
    packed_metadata = "metadata"

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def run(self, *arguments: object) -> None:
        self.calls.append(arguments)


class Kernel:
    """Compiles anew for each ordinary launch, and remembers it."""

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.asked: list[tuple[tuple[object, ...], int]] = []

    def __getitem__(self, grid: object) -> Callable[..., Compiled]:
        assert grid == GRID

        def launch(*arguments: object, num_warps: int) -> Compiled:
            self.asked.append((arguments, num_warps))
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


@pytest.fixture(autouse=True)
def stream_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_launch, "_stream_lookup", lambda: lambda device: STREAM)


def rows(dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    """`offset` elements behind a multiple of 16 bytes."""
    whole = torch.zeros(64, dtype=dtype)
    assert whole.data_ptr() % 16 == 0
    return whole[offset:]


def test_the_second_launch_has_the_first_ones_code_and_its_own_addresses() -> None:
    kernel = Kernel()
    launch = CompiledLaunch(kernel)
    first, second = (rows(), rows()), (rows(), rows(offset=4))
    launch(GRID, first, (7, 0.5), num_warps=8)
    launch(GRID, second, (7, 0.5), num_warps=8)
    assert kernel.asked == [((*first, 7, 0.5), 8)]
    addresses = [pointer.data_ptr() for pointer in second]
    assert kernel.compiled[0].calls == [(*GRID, STREAM, 5, "metadata", None, None, None, *addresses, 7, 0.5)]


@pytest.mark.parametrize(
    ("pointers", "constants", "num_warps"),
    [
        ((rows(), rows()), (8, 1), 4),
        ((rows(), rows()), (7, 16), 4),
        ((rows(), rows()), (7, 1), 8),
        ((rows(torch.bfloat16), rows()), (7, 1), 4),
        ((rows(), rows(torch.int64)), (7, 1), 4),
    ],
)
def test_other_code_is_asked_for(pointers: Any, constants: Any, num_warps: int) -> None:
    """Another constant, number of warps or type."""
    kernel = Kernel()
    launch = CompiledLaunch(kernel)
    launch(GRID, (rows(), rows()), (7, 1))
    launch(GRID, pointers, constants, num_warps)
    assert len(kernel.asked) == 2
    launch(GRID, pointers, constants, num_warps)
    assert [len(compiled.calls) for compiled in kernel.compiled] == [0, 1]


@pytest.mark.parametrize("place", [0, 1])
def test_an_odd_address_goes_triton_s_way_before_and_after(place: int) -> None:
    kernel = Kernel()
    launch = CompiledLaunch(kernel)
    odd = [rows(), rows()]
    odd[place] = rows(offset=1)
    launch(GRID, (odd[0], odd[1]), (7,))
    launch(GRID, (rows(), rows()), (7,))
    launch(GRID, (odd[0], odd[1]), (7,))
    assert len(kernel.asked) == 3
    assert not any(compiled.calls for compiled in kernel.compiled)
    launch(GRID, (rows(), rows()), (7,))
    assert [len(compiled.calls) for compiled in kernel.compiled] == [0, 1, 0]


def test_handles_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_launch, "MAX_HANDLES", 2)
    kernel = Kernel()
    launch = CompiledLaunch(kernel)
    for constant in (1, 2, 3, 3, 3, 1, 2):
        launch(GRID, (rows(),), (constant,))
    assert len(kernel.asked) == 5
    assert [len(compiled.calls) for compiled in kernel.compiled] == [1, 1, 0, 0, 0]


def test_an_unknown_triton_launches_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_launch, "_stream_lookup", lambda: None)
    kernel = Kernel()
    launch = CompiledLaunch(kernel)
    for _ in range(3):
        launch(GRID, (rows(),), (1,))
    assert len(kernel.asked) == 3
    assert not any(compiled.calls for compiled in kernel.compiled)
