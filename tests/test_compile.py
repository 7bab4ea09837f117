# SPDX-License-Identifier: BSD-3-Clause
"""Tests the layers under torch.compile: a whole training step is one graph, and each call draws anew."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from compare import close, gradients
from torch import Tensor, nn

import sdgp


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["pruned", "sparse"])
@pytest.mark.parametrize("method", ["magnitude", "rescale", "rescale_group"])
def test_compiled_training_step(method: str, backend: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), nn.Linear(12, 4)
    )
    sdgp.convert(model, "2:4", method, backend=backend, weight_grad=("1:2", method))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return model(x).square().mean()

    expected = gradients(step(x), torch.tensor(1.0), x, *model.parameters())
    actual = gradients(torch.compile(step, fullgraph=True)(x), torch.tensor(1.0), x, *model.parameters())
    for got, wanted in zip(actual, expected, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("method", ["mvue", "unstructured"])
@pytest.mark.parametrize("backend", ["pruned", "sparse"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_draws(dynamic: bool, backend: str, method: str) -> None:
    layer = sdgp.Linear(16, 32, method=method, backend=backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for batch in (3, 5):
        x = torch.randn(batch, 16, requires_grad=True)
        output = compiled(x)
        close(output, layer(x))
        output.sum().backward()
        assert x.grad is not None
        # Each row of the pruned gradient sums about 16 of the weight's 32 rows, so it is not exact.
        assert not torch.allclose(x.grad, layer.weight.sum(0).expand(batch, -1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_sparse_conv2d(dynamic: bool, memory_format: torch.memory_format) -> None:
    layer = sdgp.Conv2d(4, 12, 3, stride=2, padding=1, groups=2, method="magnitude", backend="sparse")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        x = torch.randn(batch, 4, 9, 9).contiguous(memory_format=memory_format).requires_grad_()
        grad_output = torch.randn(batch, 12, 5, 5)
        expected = gradients(layer(x), grad_output, x, *layer.parameters())
        for got, wanted in zip(gradients(compiled(x), grad_output, x, *layer.parameters()), expected, strict=True):
            close(got, wanted)


@pytest.mark.filterwarnings("ignore:.*autocast")
def test_compiled_autocast() -> None:
    layer = sdgp.Linear(16, 8, method="magnitude", backend="pruned")

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).float().square().sum()

    x = torch.randn(4, 16, requires_grad=True)
    (expected,) = gradients(step(x), torch.tensor(1.0), x)
    (actual,) = gradients(torch.compile(step, fullgraph=True)(x), torch.tensor(1.0), x)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", ["mvue", "unstructured"])
@pytest.mark.parametrize("backend", ["pruned", "sparse"])
def test_compiled_draws_are_unbiased(backend: str, method: str) -> None:
    layer = sdgp.Linear(16, 32, method=method, backend=backend)
    compiled = torch.compile(layer, fullgraph=True)
    x, grad_output = torch.randn(500, 16, requires_grad=True), torch.randn(1, 32)
    draws = torch.stack([gradients(compiled(x), grad_output.expand(500, -1), x)[0] for _ in range(40)])
    assert not any(torch.equal(first, second) for first, second in itertools.pairwise(draws))
    draws = draws.flatten(0, 1).double()
    error = (draws.mean(0) - (grad_output @ layer.weight).detach()[0]).abs()
    assert (error <= 5 * draws.std(0) / len(draws) ** 0.5).all()


def test_a_pause_inside_compiled_code_depends_on_no_other_layer() -> None:
    model, other = (sdgp.convert(nn.Linear(16, 16), "2:4", "magnitude", backend="pruned") for _ in range(2))

    def step(x: Tensor) -> Tensor:
        with sdgp.paused(model):
            return model(x).square().sum()

    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(step, backend=counter)
    x = torch.randn(4, 16, requires_grad=True)
    for _ in range(3):
        other.hold("schedule", "scheduled")
        other.hold("schedule", "")
        (exact,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(
            exact, torch.autograd.grad(sdgp.revert(copy.deepcopy(model))(x).square().sum(), x)[0]
        )
    assert counter.frame_count == 1
    assert not model.held


def test_paused_after_compilation() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12))
    sdgp.convert(model, "1:4", "magnitude", backend="pruned")
    compiled = torch.compile(model, fullgraph=True)
    x, grad_output = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 12)

    def gradient(model: nn.Module) -> Tensor:
        return gradients(model(x), grad_output, x)[0]

    pruned = gradient(model)
    close(gradient(compiled), pruned)
    with sdgp.paused(model):
        exact = gradient(model)
        close(gradient(compiled), exact)
    assert not torch.allclose(exact, pruned)
    close(gradient(compiled), pruned)


# Whole models.


def small_squeezenet() -> tuple[nn.Module, Tensor]:
    models = pytest.importorskip("torchvision").models
    return models.squeezenet1_1(num_classes=8).features[:5], torch.randn(4, 3, 32, 32)


def small_gpt2() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config), torch.randint(0, 64, (2, 16))


def small_llama() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes)
    return transformers.LlamaForCausalLM(config), torch.randint(0, 64, (2, 16))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler and the libraries
@pytest.mark.parametrize("make", [small_squeezenet, small_gpt2, small_llama])
def test_whole_models(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    """A whole model must compile to one graph that gives eager mode's gradients, for text at every batch size."""
    torch.manual_seed(0)
    model, batch = make()
    model.float().train()
    sdgp.convert(model, "2:4", "rescale", backend="pruned")
    assert any(row.pattern for row in sdgp.report(model))

    text = not batch.is_floating_point()  # compiling a convolution for any size takes a minute

    def loss(batch: Tensor) -> Tensor:
        output = model(input_ids=batch).logits if text else model(batch)
        return output.float().square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=text)
    for x in (batch, torch.cat([batch, batch])) if text else (batch,):
        expected = gradients(loss(x), torch.tensor(1.0), *model.parameters())
        for got, wanted in zip(gradients(compiled(x), torch.tensor(1.0), *model.parameters()), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    assert torch._dynamo.utils.counters["graph_break"] == {}


# The op by itself.


@pytest.mark.parametrize("drawn_inside", [False, True])
def test_two_calls_are_not_merged(drawn_inside: bool) -> None:
    prune = torch.ops.sdgp.prune_nm if drawn_inside else sdgp.prune_nm
    twice = torch.compile(lambda x: [prune(x, 1, 4, -1, "random") for _ in range(2)], fullgraph=True)
    x = torch.randn(64, 64)
    first, second = twice(x)
    assert not torch.equal(first, second)
    assert not torch.equal(twice(x)[0], first)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x.expand(3, *x.shape),
        lambda x: x.reshape(2, 4, 8, 8).contiguous(memory_format=torch.channels_last),
    ],
    ids=["transposed", "every other", "expanded", "channels_last"],
)
def test_strides_reach_the_op(view: Callable[[Tensor], Tensor], dim: int) -> None:
    def prune(x: Tensor) -> Tensor:
        return sdgp.prune_nm(view(x).sin(), 2, 4, dim) * 2

    x = torch.randn(8, 64)
    expected, actual = prune(x), torch.compile(prune, fullgraph=True)(x)
    close(actual, expected)
    assert actual.stride() == expected.stride()
