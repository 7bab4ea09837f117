# SPDX-License-Identifier: BSD-3-Clause
"""DistributedDataParallel over two processes gives the gradients of one."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sdgp

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def make_model(convert_first: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 4)
    )
    return sdgp.convert(model, "2:4", "rescale", backend="pruned") if convert_first else model


def batch() -> torch.Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def worker(rank: int, directory: str, convert_first: bool) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's host name resolves to
    # A file, not a port that another process may take; and an end, should the other worker never come.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    gradients = backward(rank, convert_first)
    if rank == 0:
        torch.save(gradients, f"{directory}/gradients")
    dist.barrier()  # the first to leave removes the file
    dist.destroy_process_group()


def backward(rank: int, convert_first: bool) -> list[torch.Tensor]:
    """In a function of its own: a wrapper that outlives the process group keeps Gloo's threads, which may then ask for
    the interpreter while it ends, and abort."""
    model = DistributedDataParallel(make_model(convert_first))
    if not convert_first:
        sdgp.convert(model, "2:4", "rescale", backend="pruned")
    model(batch()[2 * rank : 2 * rank + 2]).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("convert_first", [True, False])
def test_two_processes_equal_one(tmp_path: Path, convert_first: bool) -> None:
    mp.spawn(worker, (str(tmp_path), convert_first), nprocs=2)
    model = make_model(True)
    model(batch()).square().mean().backward()
    for actual, parameter in zip(torch.load(tmp_path / "gradients"), model.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-4, atol=1e-6)
