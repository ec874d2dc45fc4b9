"""For all tests on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.engines import save_small_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama's folder."""
    return save_small_llama(tmp_path_factory.mktemp("model"))
