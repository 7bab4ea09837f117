# SPDX-License-Identifier: BSD-3-Clause
"""Tests that activation checkpointing, which repeats forwards, changes no gradient in any state of a layer.

Layers are square, so that a product with a transposed weight changes only the values.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sdgp

WIDTH = 256  # with WIDTH rows, the data gradient just reaches the size that auto measures

MODES = {"none": None, "reentrant": True, "non-reentrant": False}


def timer(sparse_wins: bool) -> Callable[[Callable[[], object], torch.device], float]:
    """Returns a timer that makes one product faster. The chooser times sparse and the other product alternately."""
    times = itertools.cycle((1.0, 9.0) if sparse_wins else (9.0, 1.0))
    return lambda call, device: next(times)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer: nn.Module = (
            nn.Conv2d(32, 32, 3, padding=1) if kind == "conv" else nn.Linear(WIDTH, WIDTH, bias=kind != "no bias")
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) + x


def make(kind: str, **settings: Any) -> nn.ModuleList:
    torch.manual_seed(0)
    return sdgp.convert(nn.ModuleList(Block(kind) for _ in range(3)), "2:4", **settings)


def draw_input(kind: str) -> Tensor:
    shape = {"conv": (4, 32, 24, 24), "3-D": (4, WIDTH // 4, WIDTH)}.get(kind, (WIDTH, WIDTH))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)


def gradients(
    blocks: nn.ModuleList,
    kind: str,
    mode: str,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    between: Callable[[], object] = lambda: None,
    sparse_wins: bool = True,
    steps: int = 2,
) -> list[Tensor]:
    """Returns the gradients of parameters and input after some steps with a new chooser.

    The state of the layers may change ``around`` the forward and ``between`` it and the backward.
    """
    reentrant, x = MODES[mode], draw_input(kind)
    torch.manual_seed(2)
    with sdgp.Chooser(timer=timer(sparse_wins), rounds=1):
        for _ in range(steps):
            with around():
                y = x
                for block in blocks:
                    y = block(y) if reentrant is None else checkpoint(block, y, use_reentrant=reentrant)
            between()
            y.square().mean().backward()
    return [parameter.grad for parameter in blocks.parameters()] + [x.grad]  # type: ignore[misc]


KINDS = ("linear", "no bias", "3-D", "conv")
BACKENDS = ("auto", "pruned", "dense", "sparse")


@pytest.mark.parametrize("sparse_wins", [True, False])
@pytest.mark.parametrize("method", ["magnitude", "mvue", "unstructured"])
@pytest.mark.parametrize("weight_grad", [None, "4:16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(
    kind: str, backend: str, weight_grad: str | None, method: str, sparse_wins: bool
) -> None:
    settings = {"method": method, "backend": backend, "weight_grad": weight_grad}
    runs = [gradients(make(kind, **settings), kind, mode, sparse_wins=sparse_wins) for mode in MODES]
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("kind", KINDS)
def test_auto_that_finds_exact_gives_the_plain_layers_gradients(kind: str) -> None:
    plain = gradients(sdgp.revert(make(kind)), kind, "none")
    for mode in MODES:
        for settings in ({}, {"weight_grad": "4:16"}):
            assert all(map(torch.equal, plain, gradients(make(kind, **settings), kind, mode, sparse_wins=False)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_paused_forward_is_exact_however_it_is_repeated(kind: str, backend: str, mode: str) -> None:
    plain = gradients(sdgp.revert(make(kind)), kind, "none")
    blocks = make(kind, backend=backend, weight_grad="4:16")
    assert all(map(torch.equal, plain, gradients(blocks, kind, mode, around=lambda: sdgp.paused(blocks))))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_that_prunes_is_pruned_however_it_is_repeated(backend: str, mode: str) -> None:
    """A forward that prunes must stay pruned when repeated, even if layers are paused after it."""
    settings: Any = {"method": "magnitude", "backend": backend, "weight_grad": ("4:16", "magnitude")}
    expected = gradients(make("linear", **settings), "linear", "none", steps=1)
    blocks = make("linear", **settings)
    with contextlib.ExitStack() as later:
        found = gradients(blocks, "linear", mode, between=lambda: later.enter_context(sdgp.paused(blocks)), steps=1)
    assert all(map(torch.equal, expected, found))
    plain = gradients(sdgp.revert(make("linear")), "linear", "none", steps=1)
    assert not torch.equal(plain[-1], found[-1])
    assert not torch.equal(plain[-3], found[-3])  # the last weight's gradient


@pytest.mark.parametrize("patterns", [{}, {0: "1:4", 1: "4:4", 2: "4:32"}])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_schedule_steps_between_forward_and_backward(backend: str, mode: str, patterns: dict[float, str]) -> None:
    def run(mode: str) -> list[Tensor]:
        blocks = make("linear", method="mvue", backend=backend, weight_grad="4:16")
        schedule = sdgp.Schedule(blocks, exact_first=1, patterns=patterns)
        return gradients(blocks, "linear", mode, between=schedule.step, steps=4)

    assert all(map(torch.equal, run("none"), run(mode)))


@pytest.mark.parametrize("mode", MODES)
def test_layer_set_aside_between_forward_and_backward(mode: str) -> None:
    def run(mode: str) -> list[Tensor]:
        blocks = make("linear", method="magnitude", backend="sparse", weight_grad="4:16")
        return gradients(blocks, "linear", mode, between=lambda: blocks[1].layer.hold("watch", "set aside"), steps=3)

    assert all(map(torch.equal, run("none"), run(mode)))


@pytest.mark.parametrize("mode", MODES)
def test_converted_again_between_forward_and_backward(mode: str) -> None:
    def run(mode: str) -> list[Tensor]:
        blocks = make("linear", method="magnitude", backend="auto", weight_grad="4:16")
        return gradients(
            blocks, "linear", mode, between=lambda: sdgp.convert(blocks, "1:4", "magnitude", backend="dense"), steps=3
        )

    assert all(map(torch.equal, run("none"), run(mode)))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_layer_that_is_known_to_be_exact_is_the_plain_one(kind: str) -> None:
    """A layer known to be exact must be the plain one, unless saved-tensor hooks show that it may be repeated."""
    blocks = make(kind)
    layer, x = blocks[0].layer, draw_input(kind)
    plain = type(sdgp.revert(copy.deepcopy(layer))(x).grad_fn).__name__
    with sdgp.Chooser(timer=timer(False)):
        assert type(layer(x).grad_fn).__name__ != plain  # not measured yet
        layer(x).sum().backward()
        assert type(layer(x).grad_fn).__name__ == plain
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            assert type(layer(x).grad_fn).__name__ != plain
    with sdgp.Chooser(timer=timer(True)):
        layer(x).sum().backward()
        assert type(layer(x).grad_fn).__name__ != plain
        with sdgp.paused(blocks):
            assert type(layer(x).grad_fn).__name__ == plain


@pytest.mark.parametrize("between", [True, False])
def test_many_pauses_between_forward_and_backward(between: bool) -> None:
    model = make("linear", method="magnitude", backend="pruned")
    x = draw_input("linear")

    def run(many: bool) -> Tensor:
        with sdgp.paused(model) if many else contextlib.nullcontext():
            output = checkpoint(model[0], x, use_reentrant=True)
        for _ in range(100 if between else 0):  # an evaluation, which records nothing
            with sdgp.paused(model), torch.no_grad():
                model[0](x)
        x.grad = None
        output.square().sum().backward()
        assert x.grad is not None
        return x.grad

    (exact,) = torch.autograd.grad(sdgp.revert(copy.deepcopy(model))[0](x).square().sum(), x)
    torch.testing.assert_close(run(True), exact)
    assert (run(False) - exact).norm() > 0.1 * exact.norm()


def test_pause_changes_nothing_that_was_decided() -> None:
    layer, x = sdgp.Linear(8, 8, backend="dense"), torch.randn(4, 8, requires_grad=True)
    for hooks in (contextlib.nullcontext, lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)):
        layer(x).sum().backward()
        with sdgp.paused(layer), hooks():
            layer(x).sum().backward()
            assert sdgp.report(layer)[0].product == "exact"
        assert (sdgp.report(layer)[0].product, layer.is_pruning) == ("dense", True)


def test_call_that_differs_from_the_last_one_is_decided_anew() -> None:
    """The fast path to the plain operator must only serve calls that equal the last call."""
    layer, x = sdgp.Linear(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH, requires_grad=True)
    larger = torch.randn(2 * WIDTH, WIDTH, requires_grad=True)

    def is_plain(x: Tensor) -> bool:
        return "Addmm" in type(layer(x).grad_fn).__name__ or "ToCopy" in type(layer(x).grad_fn).__name__

    with sdgp.Chooser(timer=timer(False)) as chooser:
        layer(x).sum().backward()
        assert is_plain(x)
        assert is_plain(x)
        assert not is_plain(larger)
        assert is_plain(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_plain(x)
        assert is_plain(x)
        chooser.forget()
        assert not is_plain(x)
    assert is_plain(x[:8])  # too small
    assert not is_plain(x)
    sdgp.convert(layer, "4:32", backend="dense")
    assert not is_plain(x[:8])


@pytest.mark.parametrize("change", [sdgp.revert, lambda blocks: sdgp.convert(blocks, backend="dense")])
@pytest.mark.parametrize("rows", [WIDTH, 32])
def test_layer_of_another_class_at_the_repetition_is_an_error(change: Callable[[nn.Module], Any], rows: int) -> None:
    layer: nn.Module = nn.Linear(WIDTH, WIDTH)
    if change is sdgp.revert:
        sdgp.convert(layer, backend="dense")
    y = checkpoint(layer, torch.randn(rows, WIDTH, requires_grad=True), use_reentrant=False)
    change(layer)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        y.sum().backward()


def test_recomputation_under_autocast_saves_and_computes_the_same() -> None:
    def run(mode: str) -> list[Tensor]:
        blocks = make("3-D", method="magnitude", backend="dense", weight_grad=("4:16", "magnitude"))
        return gradients(blocks, "3-D", mode, around=lambda: torch.autocast("cpu", torch.bfloat16))

    expected = run("none")
    for mode in MODES:
        assert all(map(torch.equal, expected, run(mode)))


def save_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_checkpointing(backend: str, autocast: bool) -> None:
    """All blocks share one autocast region in the forward, but each recomputation has a region of its own."""

    def run(selective: bool) -> list[Tensor]:
        x, blocks = draw_input("linear"), make("linear", method="magnitude", backend=backend)
        settings = {"context_fn": partial(create_selective_checkpoint_contexts, save_products)} if selective else {}
        found = []
        with sdgp.Chooser(timer=timer(True)):
            for _ in range(2):  # before and after the measurement of "auto"
                y = x
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    for block in blocks:
                        y = checkpoint(block, y, use_reentrant=False, **settings)
                found += torch.autograd.grad(y.float().square().sum(), [x, *blocks.parameters()])
        return found

    assert all(map(torch.equal, run(False), run(True)))


class RunsInBackward(torch.autograd.Function):
    """The identity, whose backward calls a function of the saved input and the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            return ctx.call(ctx.saved_tensors[0].detach().requires_grad_(), grad), None


def test_settings_changed_inside_a_backward_hold_there() -> None:
    """The backward of an implicit layer runs a model. That is no recomputation of an earlier forward."""
    layer = sdgp.convert(nn.Linear(16, 16, bias=False), "2:4", "magnitude", backend="dense").requires_grad_(False)
    x, grad = torch.randn(2, 4, 16)

    def data_gradient(x: Tensor, grad: Tensor) -> Tensor:
        return torch.autograd.grad(layer(x), x, grad)[0]

    def paused(x: Tensor, grad: Tensor) -> Tensor:
        with sdgp.paused(layer):
            return data_gradient(x, grad)

    def penalty(x: Tensor, grad: Tensor) -> Tensor:
        with sdgp.paused(layer):
            (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            return torch.autograd.grad(slope.square().sum(), x)[0]

    def converted(x: Tensor, grad: Tensor) -> Tensor:
        sdgp.convert(layer, "1:4", "magnitude", backend="dense")
        return data_gradient(x, grad)

    square = layer.weight.t() @ layer.weight
    for call, expected in (
        (paused, grad @ layer.weight),
        (penalty, 8 * x @ square @ square),
        (converted, sdgp.prune_nm(grad, 1, 4) @ layer.weight),
    ):
        leaf = x.clone().requires_grad_()
        RunsInBackward.apply(leaf, call).backward(grad)
        torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_that_quantize_what_is_saved(backend: str) -> None:
    def pack(saved: Tensor) -> tuple[Tensor, Tensor]:
        scale = saved.abs().max() / 127
        return (saved / scale).round().to(torch.int8), scale

    layer = sdgp.convert(nn.Linear(WIDTH, WIDTH), "2:4", backend=backend)
    x = torch.randn(WIDTH, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0] * packed[1]):
        y = layer(x)
    y.square().mean().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradient_penalty_through_checkpoints_under_auto_is_that_of_the_plain_model() -> None:
    """A gradient penalty under auto must be the plain model's, since the first, recorded backward is exact.

    The last backward may prune if that is found to be faster.
    """

    def penalty(blocks: nn.ModuleList, mode: str) -> Tensor:
        reentrant, x = MODES[mode], draw_input("linear")
        y = x
        for block in blocks:
            y = block(y) if reentrant is None else checkpoint(block, y, use_reentrant=reentrant)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = penalty(sdgp.revert(make("linear")), "none")
    for mode in ("none", "non-reentrant"):
        with sdgp.Chooser(timer=timer(False)):
            assert torch.equal(penalty(make("linear"), mode), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("backend", ["auto", "pruned"])
@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}])
def test_transformers_checkpointing(options: dict[str, Any], backend: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 64, (2, WIDTH // 2))

    def run(checkpointing: bool) -> list[Tensor]:
        model = sdgp.convert(copy.deepcopy(plain), "2:4", "magnitude", backend=backend).train()
        if checkpointing:
            model.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": options} if options else {}))
        with sdgp.Chooser(timer=timer(True), rounds=1):
            model(input_ids=tokens, labels=tokens).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(map(torch.equal, run(False), run(True)))


def test_timm_checkpointing() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64, depth=2)
    images = torch.randn(16, 3, 64, 64)

    def run(checkpointing: bool) -> list[Tensor]:
        model = sdgp.convert(copy.deepcopy(plain), "2:4", "magnitude").train()
        model.set_grad_checkpointing(checkpointing)
        with sdgp.Chooser(timer=timer(True), rounds=1):
            model(images).sum().backward()
        assert "sparse" in {row.product for row in sdgp.report(model)}
        return [parameter.grad for parameter in model.parameters()]

    assert all(map(torch.equal, run(False), run(True)))


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("backend", ["auto", "pruned"])
@pytest.mark.parametrize("mode", MODES)
def test_fsdp2_and_checkpointing(mode: str, backend: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    expected = gradients(make("linear", method="magnitude", backend=backend), "linear", "none")
    blocks = make("linear", method="magnitude", backend=backend)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    found = gradients(blocks, "linear", mode)
    assert all(
        torch.equal(plain, sharded.full_tensor() if hasattr(sharded, "full_tensor") else sharded)
        for plain, sharded in zip(expected, found, strict=True)
    )
