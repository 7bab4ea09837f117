# SPDX-License-Identifier: BSD-3-Clause
"""What linear and conv2d share around their products: whether a call goes through the autograd Function, and what the
Function remembers of it.

Note [One path]
A forward may run twice: activation checkpointing repeats it in the middle of a backward, after other layers have been
measured, a `paused` block has ended or a schedule has moved on. So whether a call goes through the Function, and what
the Function saves, depends only on what the repetition sees again: the arguments, `backend`, and whether gradients are
recorded. Everything else is decided in the backward, from what the first forward noted in its `Call`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function, forward_ad

from .._choose import LEAST_WORK, SMALL, Chooser, current_chooser, static_rule
from .._decision import Decision, Products, Site
from .._ops import PRUNED_DTYPES, prune_nm
from .._pattern import Pruning
from ._autocast import OptionalTensor

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


class Layer(Protocol):
    """What a call needs of a layer: a place for the decision of its last backward."""

    decision: Decision | None


class Call(NamedTuple):
    """What a forward notes for its backward.

    Attributes:
        held: why the gradient is exact whatever the settings say; empty: the settings count.
        layer: learns the decision; None for a call of ``sdgp.linear`` or ``sdgp.conv2d``.
        chooser: decides in the backward; None where the forward decided, as under torch.compile.
        product: what was decided then.
    """

    op: str
    pruning: Pruning
    held: str
    layer: Layer | None
    chooser: Chooser | None
    product: str = ""


def start(
    op: str, pruning: Pruning, held: str, layer: Layer | None, input: Tensor, weight: Tensor, work: int
) -> Call | None:
    """The note of a call that goes through the Function, or None for one that the plain operator computes.

    Args:
        work: multiply-adds of the data gradient, at stride 1.

    Raises:
        ValueError: ``op: requirement, got actual``, for tensors that sdgp cannot prune where pruning is forced.
    """
    if not (torch.is_grad_enabled() and input.requires_grad):
        return None  # no data gradient
    if torch.compiler.is_compiling():
        return _compiled(op, pruning, held, input, weight, work)
    auto = pruning.backend == "auto"
    if auto and work < LEAST_WORK:
        note(layer, SMALL)
        return None
    if torch._C._is_tracing() or torch.compiler._is_exporting_flag:
        return None  # what leaves Python keeps the forward alone, which is the plain one
    if (unusual := _unusual(input, weight)) is not None:
        if auto:
            note(layer, Decision("plain", f"only plain tensors are pruned, this call had {unusual}"))
            return None
        raise ValueError(
            f'{op}: backend="{pruning.backend}" expected plain tensors, got {unusual}; use backend="auto", or leave '
            "the layer out by the filter of sdgp.convert"
        )
    if auto and in_transform():
        note(layer, Decision("plain", "a torch.func transform or forward-mode differentiation"))
        return None
    return Call(op, pruning, held, layer, current_chooser())


def note(layer: Layer | None, decision: Decision) -> None:
    if layer is not None and layer.decision is not decision:
        vars(layer)["decision"] = decision  # nn.Module's own __setattr__ takes microseconds


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation surrounds this call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_plain(tensor: Tensor) -> bool:
    """Whether it certainly is; a fake tensor that stands for a plain one is found by ``_unusual``."""
    return (
        type(tensor) in _PLAIN_TYPES
        and tensor.dtype in PRUNED_DTYPES
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _unusual(input: Tensor, weight: Tensor) -> str | None:
    """What keeps a call from being pruned: a tensor that is more than numbers in memory. None: nothing."""
    if _is_plain(input) and _is_plain(weight):
        return None
    for name, tensor in (("input", input), ("weight", weight)):
        if type(tensor) not in _PLAIN_TYPES and not isinstance(tensor, FakeTensor):
            return f"{name} of type {type(tensor).__name__}"
        if tensor.is_nested or tensor.layout is not torch.strided:
            return f"{name} that is nested" if tensor.is_nested else f"{name} of layout {tensor.layout}"
        if tensor.dtype not in PRUNED_DTYPES:
            return f"{name} of dtype {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _compiled(op: str, pruning: Pruning, held: str, input: Tensor, weight: Tensor, work: int) -> Call | None:
    """Under torch.compile everything is decided while the forward is traced; a recomputation is part of its graph."""
    if held or pruning.is_identity or torch.compiler._is_exporting_flag:
        return None
    if pruning.backend in ("auto", "pruned"):
        sparse = work >= LEAST_WORK and static_rule(pruning, tuple(weight.shape), _exponent(input.numel()), input)
        if pruning.backend == "auto" and not sparse:
            return None
        return Call(op, pruning, "", None, None, "sparse" if sparse else "dense")
    return Call(op, pruning, "", None, None, pruning.backend)


def _exponent(size: int) -> int:
    """Of the next power of two."""
    return max(size - 1, 0).bit_length()


def make_site(
    call: Call,
    gradient: Tensor,
    weight: Tensor,
    values: int,
    pixels: int = 0,
    geometry: tuple[int, ...] = (),
    channels_last: bool = False,
) -> Site:
    """The site of a data gradient whose input has ``values`` values, ``pixels`` of them in a channel of a sample."""
    return Site(
        op=call.op,
        device=gradient.device,
        dtype=gradient.dtype,
        threads=torch.get_num_threads(),
        pruning=call.pruning,
        weight_shape=weight.shape,
        weight_contiguous=weight.is_contiguous(),
        values=_exponent(values),
        pixels=_exponent(pixels),
        geometry=geometry,
        channels_last=channels_last,
    )


def data_gradient(op: str, products: Products, decision: Decision, *sources: OptionalTensor) -> Tensor:
    """The data gradient by the product that was decided on. A pruned one refuses to be differentiated again.

    Args:
        sources: what it is made from.

    Raises:
        RuntimeError: where a transform differentiates it again.
    """
    if not decision.prunes:
        return products.exact()
    gradient = products.sparse() if decision.product == "sparse" else products.dense()
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or in_transform()):
        return gradient
    result: Tensor = _Once.apply(gradient.detach(), op, *sources)
    return result


def wanted(ctx: Any) -> list[bool]:
    """Which of the gradients of input, weight and bias this backward has to compute: it may be asked for some alone."""
    needs = list(ctx.needs_input_grad[:3])
    if not torch.compiler.is_compiling():
        for index, (node, _) in enumerate(ctx.next_functions):  # of the arguments that are tensors, which come first
            needs[index] = needs[index] and (node is None or _is_asked_for(node))
    return needs


def _is_asked_for(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad was asked for
        return True


def detached(grad_output: Tensor) -> Tensor:
    """A gradient to be pruned, which needs no gradient of its own, see ``data_gradient``."""
    return grad_output.detach() if grad_output.requires_grad or in_transform() else grad_output


def rescaled(grad_output: Tensor, dim: int, pruning: Pruning) -> tuple[Tensor, str]:
    """What a sparse product prunes, and by which method: rescale's sums need the whole gradient, so it prunes first,
    and of what it leaves magnitude keeps everything."""
    if pruning.method != "rescale":
        return grad_output, pruning.method
    return prune_nm(grad_output, *pruning.pattern, dim, "rescale"), "magnitude"


@functools.lru_cache
def held_exact(why: str) -> Decision:
    return Decision("exact", why)


def rows(x: Tensor) -> Tensor:
    """(..., features) -> (rows, features)"""
    if x.ndim == 2:
        return x
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


class _Once(Function):
    """The identity on a pruned gradient, tied to all that it is made from: its own gradient is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, op: str, *sources: OptionalTensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: expected one differentiation, got a second (create_graph=True, or nested transforms); the "
            "pruned data gradient has no gradient of its own: use sdgp.paused(model) around this forward"
        )

    jvp = backward
