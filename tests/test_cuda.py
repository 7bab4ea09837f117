# SPDX-License-Identifier: BSD-3-Clause
"""Tests that need a GPU: `pytest -m cuda`. Without a GPU they are skipped, or fail if REQUIRE_CUDA=1."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compare import close, gradients, same_as_reference
from samples import DTYPES, FIXED_METHODS, PATTERNS, Sample, cast, draw_seed, each_sample
from torch import Tensor, nn

import sdgp
from sdgp import _semi_structured as semi_structured

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        if os.environ.get("REQUIRE_CUDA"):
            pytest.fail("REQUIRE_CUDA is set, and torch finds no GPU")
        pytest.skip("needs a GPU")
    state = torch.cuda.get_rng_state()
    yield
    torch.cuda.set_rng_state(state)


@pytest.fixture
def has_product() -> None:
    missing = semi_structured.obstacle(torch.device("cuda"), torch.bfloat16, sdgp.Pattern(2, 4))
    if missing is not None:
        pytest.skip(f"needs {missing}")


def to_cuda(x: Tensor) -> Tensor:
    """Copies a tensor to the GPU with the strides of ``x``, including overlap."""
    if x.numel() == 0:
        return x.cuda()
    storage = x.untyped_storage().cuda()
    return torch.empty(0, dtype=x.dtype, device="cuda").set_(storage, x.storage_offset(), x.shape, x.stride())


# prune_nm


@each_sample()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_prunes_as_the_cpu_does(sample: Sample, dtype: torch.dtype, method: str) -> None:
    x = cast(sample.make(), dtype)
    on_gpu = to_cuda(x)
    for n, m in PATTERNS:
        seed = draw_seed()
        for op in (torch.ops.sdgp.prune_nm, torch.ops.sdgp._prune_nm_scale):
            expected = op(x, n, m, sample.dim, method, seed)
            actual = op(on_gpu, n, m, sample.dim, method, seed.cuda())
            assert actual.stride() == expected.stride()
            same_as_reference(actual.cpu(), expected, method)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    x = torch.zeros(2**31 + 8, dtype=torch.bfloat16, device="cuda")
    x[-8:] = torch.arange(8)
    pruned = sdgp.prune_nm(x, 2, 4)
    assert pruned[-8:].tolist() == [0, 0, 2, 3, 0, 0, 6, 7]
    assert pruned[:-8].count_nonzero() == 0


def test_many_dimensions_that_do_not_merge() -> None:
    x = torch.randn([2] * 11 + [8])[..., ::2].permute(*range(0, 11, 2), *range(1, 11, 2), 11)
    same_as_reference(sdgp.prune_nm(to_cuda(x), 2, 4).cpu(), sdgp.prune_nm(x, 2, 4), "magnitude")


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_nothing_but_the_output_is_allocated(method: str) -> None:
    x = torch.randn(64, 256, 32, 32, device="cuda")
    sdgp.prune_nm(x, 2, 4, 1, method)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = sdgp.prune_nm(x, 2, 4, 1, method)
    extra = torch.cuda.max_memory_allocated() - before - output.nbytes
    factors = 4 * 64 * 256 if method == "rescale" else 0
    assert extra <= factors * 8 + 4096


def test_runs_on_the_current_stream() -> None:
    x = torch.randn(64, 2**18, device="cuda")
    expected = sdgp.prune_nm(x, 2, 4)
    source = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        source.copy_(x)
        pruned = sdgp.prune_nm(source, 2, 4)  # another stream would read the zeros
    stream.synchronize()
    assert torch.equal(pruned, expected)


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_in_a_cuda_graph(method: str) -> None:
    x, seed = torch.randn(32, 64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.ops.sdgp.prune_nm(x, 2, 4, -1, method, seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pruned = torch.ops.sdgp.prune_nm(x, 2, 4, -1, method, seed)
    for i in range(3):
        x.normal_()
        seed.fill_(i)
        graph.replay()
        assert torch.equal(pruned, torch.ops.sdgp.prune_nm(x, 2, 4, -1, method, seed))


def test_a_graph_draws_anew_at_each_replay() -> None:
    x = torch.randn(64, 64, device="cuda")
    sdgp.prune_nm(x, 2, 4, method="mvue")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pruned = sdgp.prune_nm(x, 2, 4, method="mvue")
    graph.replay()
    first = pruned.clone()
    graph.replay()
    assert not torch.equal(first, pruned)


def test_on_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(64, 64)
    pruned = sdgp.prune_nm(x.to("cuda:1"), 2, 4)
    assert pruned.device == torch.device("cuda", 1)
    assert torch.equal(pruned.cpu(), sdgp.prune_nm(x, 2, 4))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_opcheck(method: str) -> None:
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    x = torch.randn(4, 16, device="cuda", requires_grad=True)
    torch.library.opcheck(torch.ops.sdgp.prune_nm, (x, 2, 4, -1, method, seed))
    matrix = torch.randn(130, 70, device="cuda").bfloat16()
    torch.library.opcheck(torch.ops.sdgp._pack_24, (matrix, 2, 4, method, seed, "cusparselt_sm80"))


def test_seed_on_the_wrong_device() -> None:
    x = torch.randn(4, 8, device="cuda")
    with pytest.raises(RuntimeError, match=r"prune_nm: expected seed on the input's device \(cuda:0\), got cpu"):
        torch.ops.sdgp.prune_nm(x, 2, 4, -1, "mvue", torch.zeros(1, dtype=torch.int64))


def test_unstructured_needs_a_cpu() -> None:
    x = torch.randn(4, 8, device="cuda")
    with pytest.raises(RuntimeError, match=r"prune_nm: expected a tensor on the CPU for unstructured, got one on cuda"):
        sdgp.prune_nm(x, 2, 4, method="unstructured")
    assert torch.equal(sdgp.prune_nm(x, 4, 4, method="unstructured"), x)
    layer = sdgp.convert(torch.nn.Linear(8, 8, device="cuda"), method="unstructured")
    layer(x).sum().backward()
    assert "a cpu for the method unstructured" in sdgp.report(layer)[0].why


# The sparse product.


@pytest.mark.usefixtures("has_product")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_layout_is_known(dtype: torch.dtype) -> None:
    assert semi_structured.metadata_layout(0, dtype) is not None


@pytest.mark.usefixtures("has_product")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", FIXED_METHODS)
@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (2, 8), (2, 12), (2, 16), (1, 32), (2, 64)])
@pytest.mark.parametrize("shape", [(256, 192, 128), (100, 70, 50), (1, 8, 8), (513, 64, 257)])
@pytest.mark.parametrize("transposed", [False, True])
def test_product(
    dtype: torch.dtype, method: str, pattern: tuple[int, int], shape: tuple[int, int, int], transposed: bool
) -> None:
    rows, cols, columns = shape
    matrix = torch.randn((cols, rows) if transposed else (rows, cols), device="cuda").to(dtype)
    matrix = matrix.t() if transposed else matrix
    dense = torch.randn(cols, columns, device="cuda").to(dtype)
    seed = draw_seed().cuda()
    operand = semi_structured.pack(matrix, sdgp.Pattern(*pattern), method, seed)
    pruned = torch.ops.sdgp.prune_nm(matrix, *pattern, -1, method, seed)
    close(semi_structured.multiply(operand, dense), pruned @ dense)


@pytest.fixture
def has_float8_product() -> None:
    missing = semi_structured.float8_obstacle(torch.device("cuda"), torch.bfloat16, sdgp.Pattern(2, 4), "")
    if missing is not None:
        pytest.skip(f"needs {missing}")


@pytest.mark.usefixtures("has_float8_product")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 192, 128), (100, 70, 50), (1, 8, 8), (513, 64, 257)])
def test_float8_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, cols, columns = shape
    matrix = sdgp.prune_nm(torch.randn(rows, cols, device="cuda"), 2, 4).to(torch.float8_e4m3fn)
    dense = torch.randn(columns, cols, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.rand(rows, device="cuda") + 0.5
    expected = scale[:, None] * (matrix.float() @ dense.float().t())
    close(semi_structured.multiply_float8(matrix, dense, scale, dtype), expected.to(dtype))


@pytest.mark.usefixtures("has_float8_product")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_linear(recipe: str) -> None:
    pytest.importorskip("torchao")
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    linear = nn.Linear(256, 512, device="cuda", dtype=torch.bfloat16)
    layer = Float8Linear.from_float(linear, Float8LinearConfig.from_recipe_name(recipe))
    weight_grad = None if recipe == "rowwise_with_gw_hp" else ("2:4", "magnitude")  # whose product is in bfloat16
    sdgp.convert(layer, "2:4", "magnitude", backend="sparse", weight_grad=weight_grad)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    dx, dw = gradients(layer(x), grad, x, layer.weight)
    expected = sdgp.prune_nm(grad, 2, 4).float() @ layer.weight.float()
    of_weight = (grad if weight_grad is None else sdgp.prune_nm(grad, 2, 4, 0)).t().float() @ x.float()
    assert (dx.float() - expected).norm() < 0.06 * expected.norm()
    assert (dw.float() - of_weight).norm() < 0.06 * of_weight.norm()


@pytest.mark.usefixtures("has_product")
@pytest.mark.parametrize("method", ["magnitude", "rescale", "mvue"])
@pytest.mark.parametrize("width", [72, 136])  # with 136, the weight is square
def test_linear(method: str, width: int) -> None:
    x = torch.randn(4, 50, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(136, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(4, 50, 136, device="cuda", dtype=torch.bfloat16)
    results = []
    for backend in ("sparse", "dense"):
        torch.manual_seed(0)
        output = sdgp.linear(x, weight, method=method, backend=backend, weight_grad=("2:4", method))
        results.append(gradients(output, grad, x, weight))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.usefixtures("has_product")
@pytest.mark.parametrize("method", ["magnitude", "rescale", "mvue"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("window", [(1, 1, 0, 1), (1, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2)])
def test_conv2d(method: str, channels_last: bool, window: tuple[int, int, int, int]) -> None:
    kernel, stride, padding, dilation = window
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 24, 9, 8, device="cuda").half().contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(40, 24, kernel, kernel, device="cuda").half().requires_grad_()
    results = []
    for backend in ("sparse", "dense"):
        torch.manual_seed(0)
        output = sdgp.conv2d(x, weight, None, stride, padding, dilation, method=method, backend=backend)
        grad = torch.ones_like(output) * torch.linspace(-1, 1, 40, device="cuda").half().view(-1, 1, 1)
        results.append(gradients(output, grad, x, weight))
    assert results[0][0].stride() == results[1][0].stride()
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.usefixtures("has_product")
def test_autocast_backward() -> None:
    model = sdgp.convert(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), "2:4", backend="sparse")
    model.cuda()
    x = torch.randn(32, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        model(x).square().mean().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_a_sparse_product() -> None:
    x = torch.randn(4, 64, device="cuda", requires_grad=True)
    weight = torch.randn(64, 64, device="cuda")
    expected = r'linear: backend="sparse" expected float16 or bfloat16 on cuda \(torch.autocast\), got float32'
    with pytest.raises(ValueError, match=expected):
        sdgp.linear(x, weight, backend="sparse").sum().backward()
    (grad,) = gradients(sdgp.linear(x, weight), torch.ones(4, 64, device="cuda"), x)
    close(grad, torch.ones(4, 64, device="cuda") @ weight)  # auto: the exact gradient


def test_compile() -> None:
    weight = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16)

    @torch.compile(fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return sdgp.linear(x, weight, method="magnitude", backend="pruned")

    x = torch.randn(16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    (actual,) = gradients(step(x), grad, x)
    close(actual, sdgp.prune_nm(grad, 2, 4) @ weight)


def test_distributed_with_nccl(tmp_path: Path) -> None:
    if not torch.distributed.is_nccl_available():
        pytest.skip("needs nccl")
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = sdgp.convert(nn.Linear(64, 64), "2:4", "magnitude", backend="pruned").cuda()
        x = torch.randn(8, 64, device="cuda", requires_grad=True)
        nn.parallel.DistributedDataParallel(model, device_ids=[0])(x).square().sum().backward()
        assert x.grad is not None
        assert model.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_into_a_cuda_graph() -> None:
    layer = sdgp.Linear(256, 256, device="cuda", dtype=torch.bfloat16, backend="pruned")
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(lambda x: layer(x).float().square().mean(), mode="reduce-overhead", fullgraph=True)
    drawn = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        (grad,) = torch.autograd.grad(compiled(x), x)
        drawn.append(grad.clone())
    assert not any(torch.equal(first, second) for first, second in itertools.pairwise(drawn))
    exact = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias).float().square().mean(), x)[0]
    for grad in drawn:
        assert torch.nn.functional.cosine_similarity(grad.float().flatten(), exact.float().flatten(), 0) > 0.5
