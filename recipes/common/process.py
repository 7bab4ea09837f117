# SPDX-License-Identifier: BSD-3-Clause
"""The processes of a run: one, or those that torchrun started; their devices, seeds, and the wish to stop."""

from __future__ import annotations

import hashlib
import os
import signal
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def start(device: str | None = None) -> World:
    """Joins the processes that torchrun started, if any. ``device``: of a single one; None: a GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return World(0, 1, torch.device(device or ("cuda" if has_gpu else "cpu")))
    on_gpu = has_gpu and device != "cpu"
    where = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=where if on_gpu else None)
    return World(dist.get_rank(), dist.get_world_size(), where)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any parts: all randomness of a step comes from (seed, rank, step), so that a resumed run needs
    no generator's state and is the same, bit for bit."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Stop:
    """SIGINT or SIGTERM, noted for the training loop, which saves and leaves. A second SIGINT interrupts at once."""

    def __init__(self, world: World, every: int = 10) -> None:
        self._world, self._every, self._asked = world, every, False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self, step: int) -> bool:
        """Whether to stop after ``step``: the same answer in all processes, which ask each other every few steps."""
        if self._world.size == 1:
            return self._asked
        if step % self._every:
            return False
        return bool(self._world.sum(torch.tensor(float(self._asked), device=self._world.device)))

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
