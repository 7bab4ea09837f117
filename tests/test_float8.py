# SPDX-License-Identifier: BSD-3-Clause
"""Tests torchao's Float8Linear with pruned gradients. A stand-in for cuSPARSELt's operators runs on a CPU."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import Timer, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sdgp
from sdgp import _semi_structured as semi_structured
from sdgp._autograd import rows

pytest.importorskip("torchao.float8.float8_linear", exc_type=ImportError)
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def plain_layer(
    recipe: str = "tensorwise",
    features: tuple[int, int] = (64, 96),
    bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)  # runs on every CPU
    return Float8Linear.from_float(nn.Linear(*features, bias=bias).to(dtype), config)


def layer_and_twin(backend: str, recipe: str = "tensorwise", **settings: Any) -> tuple[Any, Any]:
    plain = plain_layer(recipe)
    return plain, sdgp.convert(copy.deepcopy(plain), "2:4", "magnitude", backend=backend, **settings)


def sample(*lead: int, features: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(*lead, features, dtype=torch.bfloat16, requires_grad=True)
    return x, torch.randn(*lead, 96, dtype=torch.bfloat16)


def all_gradients(layer: Any, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    return gradients(layer(x), grad_output, x, layer.weight, layer.bias)


def is_torchaos(output: Tensor) -> bool:
    """Returns whether torchao's own function computed the output, before the bias was added."""
    assert output.grad_fn is not None
    return "matmul_with_hp_or_float8_args" in output.grad_fn.next_functions[0][0].name()


def equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, actual, expected))


@pytest.fixture
def cusparselt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the sparse product available on a CPU."""

    def compress(matrix: Tensor) -> Tensor:
        kept = matrix.float().unflatten(1, (-1, 4)).count_nonzero(2)
        assert matrix.dtype == torch.float8_e4m3fn
        assert matrix.shape[0] % 32 == matrix.shape[1] % 64 == 0
        assert kept.max() <= 2
        return matrix

    def multiply(packed: Tensor, dense: Tensor, *, alpha: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert dense.dtype == torch.float8_e4m3fn
        assert dense.t().is_contiguous()  # float8 products take no other layout
        assert dense.shape[1] % 16 == 0
        return (alpha[:, None] * (packed.float() @ dense.float())).to(out_dtype)

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(semi_structured, "float8_obstacle", lambda *_: None)


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()])
@pytest.mark.parametrize("recipe", RECIPES)
def test_exact_gradients_are_those_of_torchao(recipe: str, lead: tuple[int, ...]) -> None:
    plain, layer = layer_and_twin("pruned", recipe)
    with sdgp.paused(layer), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        x, grad_output = sample(*lead)  # with hooks, a paused layer runs sdgp's own products
        assert torch.equal(layer(x), plain(x))
        assert not is_torchaos(layer(x))
        assert equal(all_gradients(layer, x, grad_output), all_gradients(plain, x, grad_output))


@pytest.mark.parametrize("backend", ["dense", "pruned"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dense_product_is_torchaos_of_the_pruned_gradient(recipe: str, backend: str) -> None:
    plain, layer = layer_and_twin(backend, recipe, weight_grad=("4:8", "magnitude"))
    x, grad_output = sample(4, 8)
    dx, dw, db = all_gradients(layer, x, grad_output)
    assert torch.equal(dx, all_gradients(plain, x, sdgp.prune_nm(grad_output, 2, 4))[0])
    by_rows = sdgp.prune_nm(rows(grad_output), 4, 8, 0).view_as(grad_output)
    assert torch.equal(dw, all_gradients(plain, x, by_rows)[1])
    assert torch.equal(db, all_gradients(plain, x, grad_output)[2])
    assert [row.product for row in sdgp.report(layer)] == ["dense", "dense"]


@pytest.mark.usefixtures("cusparselt")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(5, 64, 96), (128, 128, 256), (130, 50, 72)])
def test_the_sparse_product_has_a_scale_for_each_row(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    count, features_in, features_out = size
    plain = plain_layer(features=(features_in, features_out), dtype=dtype)
    layer = sdgp.convert(copy.deepcopy(plain), "2:4", "magnitude", backend="sparse")
    x = torch.randn(count, features_in, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(count, features_out).mul(10.0 ** -torch.arange(count).remainder(4)[:, None]).to(dtype)
    dx, dw, _ = all_gradients(layer, x, grad_output)
    assert layer.decision.product == "sparse"
    expected = sdgp.prune_nm(grad_output, 2, 4).double() @ layer.weight.detach().double()
    # e4m3 rounds each factor by at most 2**-4; the norm of a row's error is far smaller than their sum.
    assert dx.dtype == dtype
    error = (dx.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.06
    assert torch.equal(dw, all_gradients(plain, x, grad_output)[1])


@pytest.mark.usefixtures("cusparselt")
def test_a_sparse_weight_gradient() -> None:
    _, layer = layer_and_twin("sparse", weight_grad=("2:4", "magnitude"))
    x, grad_output = sample(32)
    dw = all_gradients(layer, x, grad_output)[1]
    expected = sdgp.prune_nm(grad_output, 2, 4, 0).t().double() @ x.detach().double()
    assert layer.weight_decision.product == "sparse"
    assert (dw.double() - expected).norm() < 0.06 * expected.norm()
    assert dw.is_contiguous()


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.usefixtures("cusparselt")
def test_rescale_has_a_factor_for_each_sample_and_channel(backend: str) -> None:
    layer = sdgp.convert(plain_layer(), "2:4", "rescale", backend=backend)
    x, grad_output = sample(4, 8)
    dx = gradients(layer(x), grad_output, x)[0].double()
    expected = sdgp.prune_nm(grad_output, 2, 4, -1, "rescale").double() @ layer.weight.detach().double()
    assert (dx - expected).norm() < 0.1 * expected.norm()
    by_row = sdgp.prune_nm(rows(grad_output), 2, 4, -1, "rescale").double() @ layer.weight.detach().double()
    assert (dx - by_row.view_as(dx)).norm() > 1.5 * (dx - expected).norm()


@pytest.mark.usefixtures("cusparselt")
def test_layers_with_other_casts_have_decisions_of_their_own() -> None:
    x = torch.randn(256, 256, dtype=torch.bfloat16, requires_grad=True)
    with sdgp.Chooser(timer=Timer(1.0, 2.0), search=False) as chooser:
        for count, recipe in enumerate(RECIPES, 1):
            layer = sdgp.convert(plain_layer(recipe, (256, 512)))
            layer(x).sum().backward()
            assert len(chooser) == count
        other = sdgp.Chooser()
        other.load_state_dict(chooser.state_dict())
        assert other.state_dict() == chooser.state_dict()


def test_a_forced_backend_in_a_transform_is_an_error() -> None:
    _, layer = layer_and_twin("dense")
    with pytest.raises(ValueError, match=r'^float8_linear: backend="dense" expected no torch.func transform'):
        torch.func.grad(lambda x: layer(x).sum())(sample(4)[0])


@pytest.mark.usefixtures("cusparselt")
def test_flops() -> None:
    _, layer = layer_and_twin("sparse")
    x, grad_output = sample(32)
    output = layer(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch.autograd.grad(output, x, grad_output)
    assert counter.get_total_flops() == 32 * 96 * 64  # two for each second value


@pytest.mark.usefixtures("cusparselt")
def test_a_row_of_zeros() -> None:
    _, layer = layer_and_twin("sparse")
    x, grad_output = sample(8)
    grad_output[3] = 0
    dx = all_gradients(layer, x, grad_output)[0]
    assert dx.isfinite().all()
    assert not dx[3].any()


@pytest.mark.usefixtures("cusparselt")
@pytest.mark.parametrize("wins", ["sparse", "exact"])
def test_auto_measures_the_products(wins: str) -> None:
    plain = plain_layer(features=(256, 512))
    layer = sdgp.convert(copy.deepcopy(plain))
    x = torch.randn(256, 256, dtype=torch.bfloat16, requires_grad=True)
    with sdgp.Chooser(timer=Timer(1.0, 2.0) if wins == "sparse" else Timer(2.0, 1.0), search=False) as chooser:
        for _ in range(2):
            gradients(layer(x), torch.randn(256, 512, dtype=torch.bfloat16), x)
    assert len(chooser) == 1
    assert layer.decision.product == wins


def test_auto_on_a_cpu_is_torchaos_layer() -> None:
    layer = sdgp.convert(plain_layer(features=(256, 512)))
    x = torch.randn(256, 256, dtype=torch.bfloat16, requires_grad=True)
    assert is_torchaos(layer(x))
    assert "cuda for float8, got cpu" in sdgp.report(layer)[0].why


def test_forced_sparse_says_what_it_needs() -> None:
    _, layer = layer_and_twin("sparse")
    with pytest.raises(ValueError, match=r'float8_linear: backend="sparse" expected cuda for float8, got cpu'):
        all_gradients(layer, *sample(4))


CASTS = "dyn_ten_e5m2 dyn_ten_e4m3"


def obstacle(dtype: torch.dtype = torch.bfloat16, pattern: str = "2:4", casts: str = CASTS) -> str | None:
    return semi_structured.float8_obstacle(torch.device("cuda", 0), dtype, sdgp.Pattern.parse(pattern), casts)


@pytest.mark.parametrize(
    ("capability", "library", "right", "expected"),
    [
        ((8, 6), True, True, "a GPU of compute capability 8.9 or newer for float8, got 8.6"),
        ((9, 0), False, True, f"a torch with cuSPARSELt, got torch {torch.__version__} without it"),
        ((9, 0), True, False, "a cuSPARSELt that multiplies float8 with a scale per row, got None"),
        ((8, 9), True, True, None),
    ],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], library: bool, right: bool, expected: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: library)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: None)
    monkeypatch.setattr(semi_structured, "_multiplies_float8", lambda device: right)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(semi_structured, "_float8_obstacles", {})
    assert obstacle() == expected
    assert "got float64" in str(obstacle(dtype=torch.float64))
    assert "got 4:8" in str(obstacle(pattern="4:8"))
    assert "got dis_ten_e4m3 dis_ten_e4m3" in str(obstacle(casts="dis_ten_e4m3 dis_ten_e4m3"))
    assert "not emulated" in str(obstacle(casts=CASTS + " emulate"))


def test_a_captured_graph_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(semi_structured, "_float8_obstacles", {})
    assert "before the capture" in str(obstacle())
    monkeypatch.setattr(semi_structured, "_float8_obstacles", {0: None})
    assert obstacle() is None


@pytest.mark.usefixtures("cusparselt")
def test_the_library_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch._cslt_sparse_mm
    assert semi_structured._multiplies_float8(torch.device("cpu"))

    def without_scales(packed: Tensor, dense: Tensor, *, alpha: Tensor, out_dtype: torch.dtype) -> Tensor:
        return right(packed, dense, alpha=alpha[:1].expand(len(packed)), out_dtype=out_dtype)

    def refuses(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED")

    for product in (without_scales, refuses):
        monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
        assert not semi_structured._multiplies_float8(torch.device("cpu"))


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_a_compiled_layer(backend: str) -> None:
    plain, layer = layer_and_twin(backend)
    x, grad_output = sample(4, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    pruned = sdgp.prune_nm(grad_output, 2, 4) if backend == "dense" else grad_output
    dx, dw, db = gradients(compiled(x), grad_output, x, layer.weight, layer.bias)
    assert torch.equal(dx, all_gradients(plain, x, pruned)[0])
    assert equal([dw, db], all_gradients(plain, x, grad_output)[1:])


@pytest.mark.usefixtures("cusparselt")
def test_a_compiled_sparse_product() -> None:
    _, layer = layer_and_twin("sparse")
    x, grad_output = sample(4, 8)
    expected = all_gradients(layer, x, grad_output)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert equal(gradients(compiled(x), grad_output, x, layer.weight, layer.bias), expected)


@pytest.fixture
def under_autocast() -> Iterator[None]:
    """Turns on the autocast that torchao's layer looks at, that of CUDA, although there may be no GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.usefixtures("cusparselt")
@pytest.mark.parametrize("mode", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("backend", ["auto", "dense", "sparse"])
def test_square_layers_under_a_checkpoint_before_and_after_the_measurement(backend: str, mode: str) -> None:
    plain = plain_layer(features=(256, 256), dtype=torch.float32)
    layer = sdgp.convert(copy.deepcopy(plain), "2:4", "magnitude", backend=backend)
    x, grad_output = torch.randn(256, 256, requires_grad=True), torch.randn(256, 256)
    with sdgp.Chooser(timer=Timer(1.0, 2.0), search=False) as chooser:
        for _ in range(2):  # auto measures in the first backward
            output = layer(x) if mode == "none" else checkpoint(layer, x, use_reentrant=mode == "reentrant")
            layer.weight.grad = x.grad = None
            output.backward(grad_output)
            assert torch.equal(output, plain(x))
            exact, dw = gradients(plain(x), grad_output, x, plain.weight)
            pruned = layer.products(sdgp.prune_nm(grad_output, 2, 4), x)
            expected = pruned.exact() if backend == "dense" else pruned.sparse()
            assert torch.equal(x.grad, expected)
            assert not torch.equal(x.grad, exact)
            assert torch.equal(layer.weight.grad, dw)
    assert len(chooser) == (backend == "auto")


@pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")  # torchao calls it
@pytest.mark.usefixtures("under_autocast", "cusparselt")
@pytest.mark.parametrize("backend", ["auto", "dense", "sparse"])
def test_autocast(backend: str) -> None:
    plain = plain_layer(features=(256, 256), dtype=torch.float32)
    layer = sdgp.convert(copy.deepcopy(plain), "2:4", "magnitude", backend=backend)
    x, grad_output = torch.randn(256, 256, requires_grad=True), torch.randn(256, 256).bfloat16()
    with sdgp.Chooser(timer=Timer(2.0, 1.0), search=False):
        for _ in range(2):
            output = layer(x)
            assert output.dtype == torch.bfloat16
            assert torch.equal(output, plain(x))
            dx, dw, _ = all_gradients(layer, x, grad_output)
            exact, exact_dw, _ = all_gradients(plain, x, grad_output)
            assert (dx.dtype, dw.dtype) == (torch.float32, torch.float32)
            assert torch.equal(dx, exact) == (backend == "auto")
            assert torch.equal(dw, exact_dw)
    assert layer.decision.product == {"auto": "exact"}.get(backend, backend)
    assert backend != "auto" or layer.plain_for is not None  # the quick way for later calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint(reentrant: bool) -> None:
    plain, layer = layer_and_twin("dense")
    x, grad_output = sample(4, 8)
    output = checkpoint(layer, x, use_reentrant=reentrant)
    output.backward(grad_output)
    assert x.grad is not None
    assert torch.equal(x.grad, all_gradients(plain, x, sdgp.prune_nm(grad_output, 2, 4))[0])


def test_a_converted_model_is_copied_pickled_paused_and_reverted() -> None:
    config = dataclasses.replace(Float8LinearConfig(), emulate=True)
    model = convert_to_float8_training(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 16)).bfloat16(), config=config)
    keys, attributes = list(model.state_dict()), set(vars(model[0]))
    sdgp.convert(model, "2:4", "magnitude", backend="dense")
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], Float8Linear)
    assert "pattern=2:4" in repr(model[0])
    x, grad_output = sample(8)
    expected = gradients(model(x), grad_output[:, :16], x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(gradients(other(x), grad_output[:, :16], x), expected)
    with sdgp.paused(model):
        exact = gradients(model(x), grad_output[:, :16], x)
    assert not equal(exact, expected)
    assert [row.type for row in sdgp.report(model)] == ["Float8Linear", "Float8Linear"]
    assert [row.product for row in sdgp.profile(model, x, rounds=1)] == ["dense", "dense"]
    assert type(model[0].to_plain()) is Float8Linear
    sdgp.revert(model)
    assert set(vars(model[0])) == attributes
    assert equal(gradients(model(x), grad_output[:, :16], x), exact)


def test_advise_and_watch_know_the_layer() -> None:
    model = nn.Sequential(plain_layer())
    x, _ = sample(64)

    def loss(batch: Tensor) -> Tensor:
        return model(batch).float().pow(2).mean()

    plan = sdgp.advise(model, *(sample(32)[0].detach() for _ in range(2)), loss=lambda m, b: m(b).float().pow(2).mean())
    assert not plan
    assert "cuda for float8, got cpu" in str(plan)
    sdgp.convert(model, "2:4", "magnitude", backend="dense")
    with sdgp.watch(model, every=1) as watch:
        loss(x).backward()
    assert watch
