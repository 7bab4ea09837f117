# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("sdgp", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("sdgp")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same generator state and leaves the one it found."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
