# SPDX-License-Identifier: BSD-3-Clause
"""The processes of a run: a single one, or those that torchrun started; their devices, seeds and stop signals."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError


class World(NamedTuple):
    """The rank and device of this process, and the number of processes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums ``values`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def start(device: str | None = None) -> World:
    """Joins the processes that torchrun started, if any.

    Args:
        device: the device of a single process; None means a GPU if there is one. Under torchrun only ``"cpu"`` counts.
    """
    has_gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        try:
            where = torch.device(device or ("cuda" if has_gpu else "cpu"))
            torch.empty(0, device=where)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device: expected a device of this machine, got {device}: {error}") from None
        return World(0, 1, where)
    on_gpu = has_gpu and device != "cpu"
    where = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=where if on_gpu else None)
    return World(dist.get_rank(), dist.get_world_size(), where)


def stop() -> None:
    if dist.is_initialized():
        gc.collect()  # otherwise a wrapper in a reference cycle outlives the group, and its end may deadlock
        dist.destroy_process_group()


def derive_seed(*parts: object) -> int:
    """Derives a 63-bit seed from any values.

    All random numbers of a step depend only on (seed, rank, step). So a resumed run needs no generator state and is
    identical, bit for bit.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Stop:
    """Notes SIGINT or SIGTERM, so that the training loop can save and stop. A second SIGINT interrupts at once."""

    def __init__(self, world: World, every: int = 10) -> None:
        self._world, self._every, self._asked = world, every, False
        self.number: int = signal.SIGTERM  # which signal came, if it came to this process
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked, self.number = True, number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self, step: int) -> bool:
        """Whether to stop after ``step``. All processes get the same answer; they communicate every few steps."""
        if self._world.size == 1:
            return self._asked
        if step % self._every:
            return False
        return bool(self._world.sum(torch.tensor(float(self._asked), device=self._world.device)))

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
