# SPDX-License-Identifier: BSD-3-Clause
"""Memory: tensors of more than 2^31 elements, and that nothing is allocated but what a product needs."""

from __future__ import annotations

import math
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from samples import METHODS
from torch import Tensor

import sdgp

# More than 2^31 elements.


class Large(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dim: int
    m: int
    method: str
    ends: tuple[Any, ...]  # indexes the first and the last group's neighbourhood


ALL, ENDS = slice(None), [0, -1]
LARGE = (
    Large("groups", (2**25 + 1, 64), -1, 8, "magnitude", (ENDS,)),
    Large("gather", (2**25 + 1, 64), -1, 6, "magnitude", (ENDS,)),
    Large("sequence", (2, 2**24 + 1, 64), -1, 8, "rescale", (ALL, ENDS)),
    Large("rows", (64, 2**25 + 1), 0, 8, "magnitude", (ALL, ENDS)),
    Large("nchw", (2, 64, 2**12, 2**12 + 1), 1, 8, "rescale", (ALL, ALL, ENDS, ENDS)),
)


def available() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


def zeros_without_memory(shape: tuple[int, ...]) -> Tensor:
    """bfloat16 zeros: pages that are read but never written take no memory."""
    return torch.frombuffer(mmap.mmap(-1, 2 * math.prod(shape)), dtype=torch.bfloat16).view(shape)


@pytest.mark.slow
@pytest.mark.parametrize("large", LARGE, ids=lambda large: large.name)
def test_more_than_2_to_the_31_elements(large: Large) -> None:
    if available() < 6 << 30:
        pytest.skip("needs 6 GiB of free memory")
    x = zeros_without_memory(large.shape)
    assert x.numel() > 2**31
    ends = torch.randn(x[large.ends].shape).bfloat16()
    x[large.ends] = ends
    expected = sdgp.prune_nm(ends, 3, large.m, large.dim, large.method)
    pruned = sdgp.prune_nm(x, 3, large.m, large.dim, large.method)
    assert torch.equal(pruned[large.ends], expected)
    assert pruned.count_nonzero() == expected.count_nonzero()


# Nothing but the output.


def test_allocates_nothing_but_the_output() -> None:
    x = torch.randn(1 << 20)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        pruned = sdgp.prune_nm(x, 2, 4)
    assert pruned.nbytes == x.nbytes
    assert sum(event.self_cpu_memory_usage for event in profile.events()) == x.nbytes


# What the kernels take, the allocator does not see: the high-water mark of the process tells.
PEAK = """
import re, sys, torch, sdgp
def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
for op in (sdgp.prune_nm, torch.ops.sdgp._prune_nm_scale):
    for shape, dim in (((4096, 4096), -1), ((4096, 4096), 0), ((16, 64, 128, 128), 1), ((64, 256, 1024), -1)):
        for n, m in ((2, 4), (3, 6)):
            x = torch.randn(shape)
            op(x[:1], n, m, dim, sys.argv[1])
            before = status("VmRSS")
            open("/proc/self/clear_refs", "w").write("5")  # the mark starts again from what is resident now
            output = op(x, n, m, dim, sys.argv[1])
            print(status("VmHWM") - before - output.nbytes)
            del output
"""


@pytest.mark.parametrize("method", METHODS)
def test_the_kernels_take_no_memory(method: str) -> None:
    result = subprocess.run([sys.executable, "-c", PEAK, method], capture_output=True, text=True, check=True)
    beyond = [int(line) for line in result.stdout.split()]
    assert len(beyond) == 16
    assert max(beyond) < 2 << 20  # of 64 MiB: a block's sums, a stack


# The sparse product: the packed weight, and for each thread what it has pruned and summed of a chunk. rescale is left
# out: its sums run across rows, so that it prunes into a tensor of its own first.
SPARSE_PEAK = """
import re, sys, torch, sdgp
def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
torch.set_num_threads(2)
name, method = sys.argv[1:]
if name == "linear":
    layer = sdgp.Linear(1024, 1024, bias=False, method=method, backend="sparse")
    x = torch.randn(2048, 1024)
else:
    memory_format = torch.channels_last if name == "channels_last" else torch.contiguous_format
    layer = sdgp.Conv2d(64, 128, 3, padding=1, bias=False, method=method, backend="sparse")
    x = torch.randn(16, 64, 56, 56).contiguous(memory_format=memory_format)
layer.requires_grad_(False)
def product(x):
    output = layer(x.requires_grad_())
    grad_output = torch.randn_like(output)
    del output
    seed = torch.zeros(1, dtype=torch.int64)
    call = layer.products(grad_output, x.detach()).sparse
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the mark starts again from what is resident now
    grad_input = call(seed)
    return status("VmHWM") - before - grad_input.nbytes, grad_input
product(x.detach()[:1])
beyond, _ = product(x.detach())
print(beyond, layer.weight.nbytes)
"""


@pytest.mark.parametrize("method", sorted({*METHODS} - {"rescale"}))
@pytest.mark.parametrize("layer", ["linear", "conv2d", "channels_last"])
def test_the_sparse_product_takes_a_weight(layer: str, method: str) -> None:
    command = [sys.executable, "-c", SPARSE_PEAK, layer, method]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is not resident
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    beyond, weight = map(int, result.stdout.split())
    assert beyond <= weight + 2 * (2 << 20)  # two threads
