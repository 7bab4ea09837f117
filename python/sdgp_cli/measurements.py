# SPDX-License-Identifier: BSD-3-Clause
"""The measurements of ``sdgp bench``: pruning, the products of single layers, and training steps.

The candidates of a row run one after the other in every round. The results are medians.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdgp import Conv2d, Linear, Pattern, chooser, prune_nm
from sdgp._pattern import methods_on
from sdgp._timing import interleaved, seconds, steps_beside_plain, training_step

METHOD = "mvue"  # for products and steps

_PRODUCTS = ("exact", "sparse")

Row = dict[str, Any]

_To = dict[str, Any]  # the device and dtype arguments of Tensor.to

#: The subject, the name, and the function that measures.
Task = tuple[str, str, Callable[[], list[Row]]]

# Seconds for each row of a subject. With the untimed work, all rows together take about two minutes.
SECONDS = {"prune_nm": 3.0, "data_gradient": 3.0, "train_step": 14.0}


class Effort(NamedTuple):
    """How much ``sdgp bench`` measures, and for how long."""

    patterns: tuple[str, ...]
    shapes: int  # number of shapes for each kind of layer
    share: float  # the share of SECONDS to spend
    least_rounds: int

    def rounds(self, subject: str, seconds_a_round: float) -> int:
        return max(self.least_rounds, min(50, int(self.share * SECONDS[subject] / seconds_a_round)))


FULL = Effort(("2:4", "1:4", "4:32"), shapes=3, share=1.0, least_rounds=10)
QUICK = Effort(("2:4", "4:32"), shapes=1, share=0.1, least_rounds=3)


class Sizes(NamedTuple):
    """The sizes of the tensors and layers to measure on one type of device."""

    rows: int  # rows of 1024 values to prune
    linear: tuple[tuple[int, int, int], ...]  # tokens, in, out
    conv2d: tuple[tuple[int, int, int, int, int], ...]  # kernel, batch, in, out, height and width
    images: tuple[int, int]  # convolutional network: batch, height and width
    tokens: tuple[int, int, int]  # transformer: batch, length, width


SIZES = {
    "cpu": Sizes(
        rows=4096,
        linear=((2048, 768, 3072), (2048, 3072, 768), (2048, 1024, 1024)),
        conv2d=((3, 32, 128, 128, 16), (3, 32, 256, 256, 8), (1, 16, 256, 64, 56)),
        images=(32, 32),
        tokens=(4, 128, 512),
    ),
    # The exact product takes about a millisecond here. On smaller products a GPU gains nothing.
    "cuda": Sizes(
        rows=65536,
        linear=((8192, 4096, 4096), (8192, 4096, 11008), (8192, 11008, 4096)),
        conv2d=((3, 256, 256, 256, 28), (3, 256, 512, 512, 14), (1, 256, 1024, 512, 28)),
        images=(512, 64),
        tokens=(8, 1024, 2048),
    ),
}


def tasks(effort: Effort, device: torch.device, dtype: torch.dtype) -> Iterator[Task]:
    """Yields all tasks. The caller runs them one by one, because the tensors of all tasks would not fit in memory."""
    sizes, to = SIZES[device.type], {"device": device, "dtype": dtype}
    for name, shape, dim in (("rows", (sizes.rows, 1024), -1), ("NCHW", (sizes.rows // 64, 64, 32, 32), 1)):
        for pattern in effort.patterns:
            yield "prune_nm", f"prune_nm, {name}, {pattern}", partial(_pruning, name, shape, dim, pattern, effort, to)
    layers: list[tuple[str, Callable[[str, Effort, _To], list[Row]]]] = [
        *((f"linear {_by(size)}", partial(_linear, size)) for size in sizes.linear[: effort.shapes]),
        *((f"conv2d {_by(size)}", partial(_conv2d, size)) for size in sizes.conv2d[: effort.shapes]),
    ]
    for name, rows_of in layers:
        for pattern in effort.patterns:
            yield "data_gradient", f"{name}, {pattern}", partial(rows_of, pattern, effort, to)
    yield "train_step", "training step, convolutions", partial(_convolutions, *sizes.images, effort, to)
    yield "train_step", "training step, transformer", partial(_transformer, *sizes.tokens, effort, to)


def _pruning(name: str, shape: tuple[int, ...], dim: int, pattern: str, effort: Effort, to: _To) -> list[Row]:
    x = torch.randn(shape).to(**to)
    n, m = Pattern.parse(pattern)
    candidates: dict[str, Callable[[], Tensor]] = {"clone": x.clone}
    candidates |= {method: partial(prune_nm, x, n, m, dim, method) for method in methods_on(x.device.type)}
    a_round = 2 * sum(interleaved(candidates, 1, x.device).values())
    times = interleaved(candidates, effort.rounds("prune_nm", a_round), x.device)
    clone = times.pop("clone")
    return [
        {
            "tensor": f"{name} {_by(shape)}",
            "pattern": pattern,
            "clone_ms": round(1e3 * clone, 4),
            "times_clone": {method: round(value / clone, 3) for method, value in times.items()},
        }
    ]


def _linear(size: tuple[int, int, int], pattern: str, effort: Effort, to: _To) -> list[Row]:
    tokens, features_in, features_out = size
    layer = Linear(features_in, features_out, pattern=pattern, method=METHOD, backend="sparse")
    name = f"linear {features_in} -> {features_out}, {tokens} tokens"
    return _product(name, layer, (tokens, features_in), (tokens, features_out), effort, to)


def _conv2d(size: tuple[int, int, int, int, int], pattern: str, effort: Effort, to: _To) -> list[Row]:
    kernel, batch, channels_in, channels_out, pixels = size
    layer = Conv2d(
        channels_in, channels_out, kernel, padding=kernel // 2, pattern=pattern, method=METHOD, backend="sparse"
    )
    name = f"{kernel}x{kernel} {channels_in} -> {channels_out}, {_by((batch, pixels, pixels))}"
    shapes = (batch, channels_in, pixels, pixels), (batch, channels_out, pixels, pixels)
    return _product(name, layer.to(memory_format=torch.channels_last), *shapes, effort, to)


def _product(
    name: str, layer: Linear | Conv2d, input: tuple[int, ...], output: tuple[int, ...], effort: Effort, to: _To
) -> list[Row]:
    memory_format = torch.channels_last if len(input) == 4 else torch.contiguous_format
    tensors = (torch.randn(shape).to(**to).contiguous(memory_format=memory_format) for shape in (output, input))
    products = layer.to(**to).products(*tensors)
    row: Row = {"layer": name, "pattern": str(layer.pruning.pattern), "obstacle": products.obstacle()}
    if row["obstacle"] is not None:
        return [row | {"exact_ms": None, "sparse_ms": None, "times_exact": None}]
    once = sum(chooser.measure_all(products, _PRODUCTS, 1).values())
    ms = chooser.measure_all(products, _PRODUCTS, effort.rounds("data_gradient", 1e-3 * once))
    row |= {f"{name}_ms": round(value, 3) for name, value in ms.items()}
    return [row | {"times_exact": round(ms["exact"] / ms["sparse"], 3)}]


def _convolutions(batch: int, pixels: int, effort: Effort, to: _To) -> list[Row]:
    """Measures training steps of a network of four 3 x 3 convolutions, each with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for channels_in, channels_out, stride in ((3, 64, 1), (64, 128, 2), (128, 256, 2), (256, 256, 1)):
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    input = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
    name = f"4 convolutions, {_by((batch, 3, pixels, pixels))}"
    return _steps(name, model.to(memory_format=torch.channels_last), input, torch.randint(10, (batch,)), effort, to)


def _transformer(batch: int, length: int, width: int, effort: Effort, to: _To) -> list[Row]:
    """Measures training steps of two PyTorch transformer layers. sdgp cannot convert the projections in attention."""
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 256))
    input, target = torch.randn(batch, length, width), torch.randint(256, (batch, length))
    return _steps(f"2 transformer layers, {_by(input.shape)}", model, input, target, effort, to)


def _steps(name: str, model: nn.Module, input: Tensor, target: Tensor, effort: Effort, to: _To) -> list[Row]:
    model, input, target = model.to(**to), input.to(**to), target.to(to["device"])
    step = training_step(copy.deepcopy(model), input, target)
    step()
    a_round = (3 + len(effort.patterns)) * seconds(step, input.device)
    rounds = effort.rounds("train_step", a_round)
    rows = steps_beside_plain(model, input, target, effort.patterns, METHOD, ("auto",), rounds)
    return [{"model": name, **row} for row in rows]


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
