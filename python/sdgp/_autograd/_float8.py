# SPDX-License-Identifier: BSD-3-Clause
"""torchao's float8 linear with a pruned data gradient and, on request, a pruned weight gradient.

torchao trains a linear layer with three products q(left) q(right), where q casts to float8 with a scale. torchao's
backward always computes both gradients. sdgp needs them one by one, so it calls torchao's forward with the casts of
each product; the bits are the same. This module is imported only with torchao.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torchao.float8.config import Float8LinearConfig, ScalingGranularity
from torchao.float8.distributed_utils import tensor_already_casted_to_fp8
from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import LinearMMConfig

from .. import _semi_structured
from .._decision import Site
from .._ops import prune_nm
from .._pattern import Pruning
from .._rules import obstacle
from .._semi_structured import DEFAULT, Algorithm
from ._autocast import OptionalTensor
from ._backward import decide, detached, pruned_gradient, rescaled, rows, wanted
from ._call import Call, Layer, Part, in_transform, save, site_of, start
from ._linear import count_rows

OP = "float8_linear"


class Casts(NamedTuple):
    """How torchao computes one product: what it multiplies with, and how it casts both factors to float8."""

    multiply: LinearMMConfig
    cast: Float8LinearConfig

    @property
    def name(self) -> str:
        """Says all that the time of the product depends on, for ``Site.casts``."""
        return " ".join(
            (
                self.cast.cast_config_input.short_str(),
                self.cast.cast_config_weight.short_str(),
                *(name for name, value in self.multiply.output._asdict().items() if value is True),
            )
        )


class LayerCasts(NamedTuple):
    """The casts of a layer's three products: y = x Wᵀ, dx = dy W and dW = dyᵀ x."""

    output: Casts
    data: Casts
    weight: Casts

    @classmethod
    def of(cls, layer: Any) -> LayerCasts:
        config, multiply = layer.config, layer.linear_mm_config

        def casts(left: Any, right: Any, product: Any) -> Casts:
            # The forward uses the casts of input and weight. The config also checks the gradient's, so it gets one.
            cast = Float8LinearConfig(
                cast_config_input=left,
                cast_config_weight=right,
                cast_config_grad_output=left,
                round_scales_to_power_of_2=config.round_scales_to_power_of_2,
            )
            return Casts(LinearMMConfig(product, product, product), cast)

        return cls(
            Casts(multiply, config),
            casts(config.cast_config_grad_output, config.cast_config_weight_for_grad_input, multiply.grad_input),
            casts(
                config.cast_config_grad_output_for_grad_weight,
                config.cast_config_input_for_grad_weight,
                multiply.grad_weight,
            ),
        )


def pruned_float8_linear(
    input: Tensor, weight: Tensor, pruning: Pruning, held: str, layer: Layer, casts: LayerCasts
) -> Tensor | None:
    """Computes x Wᵀ as torchao does, with pruned gradients. None: torchao's own layer must compute this call."""

    def make_site(dtype: torch.dtype) -> Site:
        names = casts.data.name, casts.weight.name
        return site_of(OP, dtype, pruning, input, weight, casts=names)

    if input.ndim == 0:
        return None  # torchao's own error
    if torch.compiler.is_compiling() and (tensor_already_casted_to_fp8(input) or tensor_already_casted_to_fp8(weight)):
        return None
    work = input.numel() * weight.shape[0]
    call = start(OP, pruning, held, layer, input, weight, work, make_site, partial(count_rows, input))
    if call is None:
        return None
    if not torch.compiler.is_compiling() and in_transform():
        raise ValueError(
            f'{OP}: backend="{pruning.backend}" expected no torch.func transform, for which torchao has no rule, got '
            'one; use backend="auto"'
        )
    output: Tensor = _Float8Linear.apply(_as_autocast(input), weight, call, casts)
    return output


def _as_autocast(input: Tensor) -> Tensor:
    """Casts the input as torchao's layer does: under the autocast of CUDA, on any device."""
    return input.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else input


class _Float8Linear(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, call: Call, casts: LayerCasts) -> Tensor:
        ctx.call, ctx.casts = call, casts
        save(ctx, weight, input)
        return _multiply(input, weight.t(), casts.output)

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> tuple[OptionalTensor, ...]:
        if grad_output is None:
            return None, None, None, None
        *_, weight, input = ctx.saved_tensors
        call: Call = ctx.call
        needs = wanted(ctx)
        grad_input = grad_weight = None
        if tensor_already_casted_to_fp8(grad_output):
            grad_output = grad_output.to_original_precision()
        if needs[0]:
            data = Float8Products(grad_output, weight, ctx.casts.data, "data", call.data.pruning)
            grad_input = _gradient(call, call.data, data)
        if needs[1]:
            part = call.weight or Part(call.data.pruning, product="exact")
            of_weight = Float8Products(rows(grad_output).t(), rows(input), ctx.casts.weight, "weight", part.pruning)
            grad_weight = _gradient(call, part, of_weight)
        return grad_input, grad_weight, None, None


def _gradient(call: Call, part: Part, products: Float8Products) -> Tensor:
    decision = decide(call, part, products)
    if not decision.prunes:
        return products.exact()
    return pruned_gradient(call, products.gradient, products, decision, products.grad_output, products.right)


def _multiply(left: Tensor, right: Tensor, casts: Casts) -> Tensor:
    result: Tensor = matmul_with_hp_or_float8_args.apply(left, right, *casts)
    return result


@dataclass(slots=True)
class Float8Products:
    """A gradient of a float8 linear layer (``Products``): ``grad_output @ right``, both cast to float8.

    Attributes:
        grad_output: (..., out) for the data gradient, (out, rows) for the weight gradient: pruned along the last
            dimension.
        right: the weight (out, in), or the input (rows, in).
        gradient: ``"data"`` or ``"weight"``.
    """

    grad_output: Tensor
    right: Tensor
    casts: Casts
    gradient: str
    pruning: Pruning

    @property
    def work(self) -> int:
        return self.grad_output.numel() * self.right.shape[1]

    def obstacle(self) -> str | None:
        grad = self.grad_output
        return obstacle(OP, self.gradient, self.pruning, grad.device, grad.dtype, casts=self.casts.name)

    def exact(self) -> Tensor:
        return _multiply(self.grad_output, self.right, self.casts)

    def dense(self, seed: OptionalTensor = None) -> Tensor:
        n, m = self.pruning.pattern
        pruned = prune_nm(detached(self.grad_output), n, m, -1, self.pruning.method, seed)
        return _multiply(pruned, self.right, self.casts)

    def sparse(self, seed: OptionalTensor = None, algorithm: Algorithm = DEFAULT) -> Tensor:
        n, m = self.pruning.pattern
        grad, method = rescaled(detached(self.grad_output), -1, self.pruning)
        pruned = prune_nm(grad, n, m, -1, method, seed)
        left, left_scale = self._cast(rows(pruned), ScalingGranularity.AXISWISE)
        right, right_scale = self._cast(self.right.t().contiguous(), ScalingGranularity.TENSORWISE)
        scale = (left_scale * right_scale).reciprocal().flatten()
        product: Tensor = _semi_structured.multiply_float8(left, right, scale, self.grad_output.dtype)
        return product.reshape(*self.grad_output.shape[:-1], self.right.shape[1])

    def operands(self, seed: OptionalTensor = None) -> None:
        """Returns None: sdgp does not search for algorithms of products in float8."""

    def _cast(self, matrix: Tensor, granularity: ScalingGranularity) -> tuple[Tensor, Tensor]:
        """Casts to float8_e4m3fn, the only float8 dtype that cuSPARSELt's operators take. Returns values and scale.

        A scale per row costs nothing here, and keeps rows of small gradients from becoming zero: e4m3 has a smaller
        range than e5m2, in which torchao casts gradients by default.
        """
        cast = hp_tensor_to_float8_dynamic(
            matrix,
            torch.float8_e4m3fn,
            self.casts.multiply,
            scaling_granularity=granularity,
            axiswise_dim=-1 if granularity is ScalingGranularity.AXISWISE else None,
            round_scales_to_power_of_2=self.casts.cast.round_scales_to_power_of_2,
        )
        return cast._data, cast._scale
