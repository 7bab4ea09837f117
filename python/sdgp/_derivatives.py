# SPDX-License-Identifier: BSD-3-Clause
"""Registers the gradients of the ops and their rules for ``torch.func.vmap``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _load as _load  # registers the ops
from ._pattern import METHODS_THAT_DRAW


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, n, m, dim, method, seed = inputs
    if seed is None and method in METHODS_THAT_DRAW and n != m:
        raise RuntimeError(f"prune_nm: expected a seed, to repeat {method} in backward, got None")
    ctx.save_for_backward(input, seed)
    ctx.settings = (n, m, dim, method)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, seed = ctx.saved_tensors
    scale = torch.ops.sdgp._prune_nm_scale(input.detach(), *ctx.settings, seed)
    # A product is not enough: at a pruned place it would turn inf into NaN.
    return torch.where(scale == 0, scale, grad_output * scale), None, None, None, None, None


torch.library.register_autograd("sdgp::prune_nm", _backward, setup_context=_setup_context)


def _refuse_gradient(op: str) -> None:
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            f"{op}: expected no differentiation, got a backward; this op has no gradient: use sdgp.linear, or "
            "sdgp.prune_nm and a dense product; torch.compile needs torch.no_grad() around it"
        )

    torch.library.register_autograd(f"sdgp::{op}", backward)


for _name in ("compress_nm", "decompress_nm", "spmm_nm"):
    _refuse_gradient(_name)


def _vmap(op: Any) -> Any:
    """Returns the rule for torch.func.vmap. It prunes each sample by itself, so no factor or draw depends on others."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
        def of_sample(index: int) -> Tensor:
            result: Tensor = op(
                *(arg if at is None else arg.select(at, index) for arg, at in zip(args, in_dims, strict=False))
            )
            return result

        if info.batch_size == 0:
            input, at = args[0], in_dims[0]
            return input.new_empty(0, *input.shape) if at is None else torch.empty_like(input.movedim(at, 0)), 0
        return torch.stack([of_sample(index) for index in range(info.batch_size)]), 0

    return rule


for _op in (torch.ops.sdgp.prune_nm, torch.ops.sdgp._prune_nm_scale):
    torch.library.register_vmap(_op.default, _vmap(_op))
