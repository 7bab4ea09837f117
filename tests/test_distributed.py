# SPDX-License-Identifier: BSD-3-Clause
"""Tests that two processes give the gradients of one: data parallel, sharded, accumulated, recomputed.

A single launch runs all cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sdgp

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")]

# A group of the weight gradient is two rows, so neither a group nor a sum crosses two processes.
convert = partial(sdgp.convert, pattern="2:4", method="rescale", backend="pruned", weight_grad=("1:2", "magnitude"))
Gradients = list[Tensor]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def batch() -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def backward(model: nn.Module, x: Tensor, forward: Callable[..., Tensor] | None = None) -> Gradients:
    (forward or model)(x).float().square().mean().backward()
    return [full(parameter.grad) for parameter in model.parameters()]


def full(grad: Tensor) -> Tensor:
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()


# The work of each process on its half of the batch.


def ddp(half: Tensor) -> Gradients:
    return backward(DistributedDataParallel(convert(make_model())), half)


def ddp_converted_after(half: Tensor) -> Gradients:
    return backward(convert(DistributedDataParallel(make_model())), half)


def ddp_accumulates(half: Tensor) -> Gradients:
    model = DistributedDataParallel(convert(make_model()))
    first, second = half.chunk(2)
    with model.no_sync():
        backward(model, first)
    return [grad / 2 for grad in backward(model, second)]


def ddp_recomputes(half: Tensor) -> Gradients:
    model = DistributedDataParallel(Recomputing(convert(make_model())))
    return backward(model, half)


def fsdp(half: Tensor) -> Gradients:
    from torch.distributed.fsdp import fully_shard

    model = convert(make_model())
    for layer in (model[0], model[3], model[5]):
        fully_shard(layer)
    return backward(fully_shard(model), half)


def fsdp_converted_after(half: Tensor) -> Gradients:
    from torch.distributed.fsdp import fully_shard

    return backward(convert(fully_shard(make_model())), half)


def fsdp_in_bfloat16(half: Tensor) -> Gradients:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = convert(make_model(), weight_grad=None)  # rounding to bfloat16 may change which are largest
    return backward(fully_shard(model, mp_policy=policy), half)


def tensor_parallel(half: Tensor) -> Gradients:
    """auto must leave sharded layers exact. Forced pruning must raise an error that says why it is impossible."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x = batch().flatten(1).repeat(2048, 1)  # large enough for auto
    for forced in (False, True):
        model = nn.Sequential(make_model()[3], nn.ReLU(), nn.Linear(12, 4))
        inner = nn.Linear(3 * 36, 8 * 16)  # gives the sharded layers a data gradient
        sdgp.convert(model, "2:4", "rescale", backend="pruned" if forced else "auto")
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if not forced:
            gradients = backward(model, inner(x))
            row = sdgp.report(model)[0]
            assert (row.product, "DTensor" in row.why) == ("plain", True)
            continue
        with pytest.raises(ValueError, match=r'^linear: backend="pruned" expected plain tensors, got .*DTensor'):
            model(inner(x))
    return gradients


class Recomputing(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.model
        return checkpoint(nn.Sequential(*rest), first(x), use_reentrant=self.reentrant)


CHECKS = (
    ddp,
    ddp_converted_after,
    ddp_accumulates,
    ddp_recomputes,
    fsdp,
    fsdp_converted_after,
    fsdp_in_bfloat16,
    tensor_parallel,
)


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # do not depend on the machine's host name
    # Meet through a file, because another process may take a port. The timeout ends the wait if the other worker fails.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    # A wrapper that outlives the process group keeps Gloo's threads, which may then call the interpreter during
    # shutdown and abort the process. So each wrapper lives only inside its function.
    found = {check.__name__: check(batch().chunk(2)[rank]) for check in CHECKS}
    if rank == 0:
        torch.save(found, f"{directory}/gradients")
    dist.barrier()  # the first process to leave removes the file
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Gradients]:
    directory = tmp_path_factory.mktemp("distributed")
    mp.spawn(worker, (str(directory),), nprocs=2)
    return torch.load(directory / "gradients")


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS if check is not tensor_parallel])
def test_two_processes_equal_one(name: str, found: dict[str, Gradients]) -> None:
    settings = {"weight_grad": None} if "bfloat16" in name else {}
    expected, exact = backward(convert(make_model(), **settings), batch()), backward(make_model(), batch())
    tolerance = 0.03 if "bfloat16" in name else 1e-5
    for actual, wanted in zip(found[name], expected, strict=True):
        assert distance(actual, wanted) < tolerance
    assert distance(exact[0], expected[0]) > 0.1
    # This is the last weight's gradient, which depends on no pruned data gradient.
    assert (distance(exact[-2], expected[-2]) > 0.1) == ("bfloat16" not in name)


def distance(actual: Tensor, wanted: Tensor) -> float:
    return ((actual - wanted).norm() / wanted.norm()).item()


def rpc_worker(rank: int, directory: str) -> None:
    from torch.distributed import autograd, rpc

    torch.set_num_threads(1)
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{directory}/store")
    rpc.init_rpc("only", rank=rank, world_size=1, rpc_backend_options=options)
    layer = sdgp.convert(nn.Linear(16, 16), "2:4", "magnitude", backend="dense")
    x = torch.randn(4, 16, requires_grad=True)
    with autograd.context() as context:
        autograd.backward(context, [layer(x).square().sum()])
        of_leaf = autograd.get_gradients(context)
        found = [of_leaf.get(leaf) for leaf in (x, *layer.parameters())]
    layer(x).square().sum().backward()
    torch.save([found, [x.grad, *(parameter.grad for parameter in layer.parameters())]], f"{directory}/gradients")
    rpc.shutdown()


def test_distributed_autograd(tmp_path: Path) -> None:
    """Distributed autograd does not tell a node which of its gradients are asked for."""
    mp.spawn(rpc_worker, (str(tmp_path),), nprocs=1)
    found, expected = torch.load(tmp_path / "gradients")
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_tensor_parallel_stays_exact(found: dict[str, Gradients]) -> None:
    model, x = nn.Sequential(make_model()[3], nn.ReLU(), nn.Linear(12, 4)), batch().flatten(1).repeat(2048, 1)
    inner = nn.Linear(3 * 36, 8 * 16)
    for actual, wanted in zip(found["tensor_parallel"], backward(model, inner(x)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["rescale", "mvue"])
def test_recomputed_activations(method: str, reentrant: bool) -> None:
    """Recomputing the forward must not change the gradients: the forward draws nothing, only the backward does."""
    gradients = []
    for recomputes in (False, True):
        model = sdgp.convert(make_model(), "2:4", method, backend="pruned", weight_grad=("1:4", method))
        forward = Recomputing(model, reentrant) if recomputes else model
        torch.manual_seed(2)
        gradients.append(backward(model, batch(), forward))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
