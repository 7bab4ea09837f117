# SPDX-License-Identifier: BSD-3-Clause
"""The shared parts of the forwards of linear and conv2d.

They decide whether a call uses the autograd Function, and note what its backward needs (``Call``).

Note [One path]
Activation checkpointing repeats a forward in the middle of a backward. By then other layers may have been measured, a
`paused` block may have ended or a schedule may have moved on. The repetition must save what the first run saved.
Checkpoints replace saved tensors by means of hooks. So if these hooks are active, a call uses the Function in every
state of its layer. The backward then decides, from what the first forward noted in its `Call`. If no hooks are active,
nothing repeats what this forward records, and a layer that is known to be exact runs as the plain layer. (A reentrant
checkpoint records only its repetition.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .._choose import SMALL, Chooser, current_chooser
from .._decision import Decision, Site
from .._ops import PRUNED_DTYPES
from .._pattern import Pruning, methods_on
from .._rules import LEAST_WORK, static_rule
from ._autocast import computed_dtype

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


class Layer(Protocol):
    """The attributes of a layer that a call uses.

    Attributes:
        decision, weight_decision: the decisions of its last backward for the data and the weight gradient.
        plain_for: the ``signature`` of the last call that the plain operator computed.
    """

    decision: Decision | None
    weight_decision: Decision | None
    plain_for: tuple[object, ...] | None


def signature(input: Tensor) -> tuple[object, ...] | None:
    """Returns a key for the calls that the plain operator computes directly.

    The plain operator is correct for every call. So the key need not contain all that a choice depends on, only what
    makes another choice likely. It is None in a backward, where a repeated forward uses its first settings.
    """
    if torch._C._current_graph_task_id() != -1 or input.is_nested:  # a nested tensor has no shape
        return None
    return input.shape, input.dtype, torch._C._is_any_autocast_enabled(), current_chooser().epoch


def has_hooks() -> bool:
    """Returns whether hooks replace what this forward saves: a checkpoint may then repeat it (Note [One path])."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_plain_again(layer: Layer, input: object) -> bool:
    """Returns quickly whether the plain operator computed the last call, a similar one, and may compute this one."""
    if torch.compiler.is_compiling():
        return False
    plain_for = vars(layer).get("plain_for")
    return (
        plain_for is not None
        and type(input) is Tensor
        and plain_for == signature(input)
        and not has_hooks()
        and not torch.are_deterministic_algorithms_enabled()
    )


class Part(NamedTuple):
    """One product of a call: the data gradient or the weight gradient.

    Attributes:
        pruning: the settings of this product only.
        site: the site for which the chooser of the call decides.
        product: the product that the forward chose under torch.compile; empty if the backward decides.
    """

    pruning: Pruning
    site: Site | None = None
    product: str = ""


class Call(NamedTuple):
    """The notes of a forward for its backward.

    Attributes:
        data: the data gradient, if there is one.
        weight: the weight gradient. None: it is exact, and there is nothing to decide.
        held: why the gradients are exact in spite of the settings; empty if the settings apply.
        layer: the layer that learns the decisions; None for a call of ``sdgp.linear`` or ``sdgp.conv2d``.
        chooser: the chooser that decides in the backward.
    """

    op: str
    data: Part
    weight: Part | None = None
    held: str = ""
    layer: Layer | None = None
    chooser: Chooser | None = None


_DATA, _WEIGHT = ("data",), ("weight",)

_DEVICES = ("cpu", "cuda", "meta")  # those with kernels, and meta, whose tensors have only shapes

# The dimension along which the groups of a weight gradient run.
_ALONG = {"linear": "rows", "float8_linear": "rows", "conv2d": "output pixels"}


def start(
    op: str,
    pruning: Pruning,
    held: str,
    layer: Layer | None,
    input: Tensor,
    weight: Tensor,
    work: int,
    make_site: Callable[[torch.dtype], Site],
    along: Callable[[], int],
) -> Call | None:
    """Returns the notes of a call that uses the Function, or None if the plain operator computes the call.

    Args:
        work: the multiply-adds of either gradient, at stride 1.
        make_site: makes the site of the data gradient from the dtype that the products compute in.
        along: returns the number of values along which the groups of a weight gradient run.

    Raises:
        ValueError: If pruning is forced and sdgp cannot prune the tensors: ``op: requirement, got actual``.
    """
    if not torch.is_grad_enabled() or _leaves_python():
        return None
    trains_input, trains_weight = _trained(input), _trained(weight)
    weight_pruning = pruning.weight if trains_weight else None
    if weight_pruning is not None and not input.is_nested and along() < weight_pruning.pattern.m:
        if not (held or torch.compiler.is_compiling()):
            note(layer, _too_few(op, along(), weight_pruning), _WEIGHT)
        weight_pruning = None
    if not (trains_input or weight_pruning is not None):
        return None  # no gradient to prune
    if pruning.backend != "auto" and not held:
        _check_kernels(op, pruning, trains_input, weight_pruning, input.device)
    if torch.compiler.is_compiling():
        return _compiled(op, pruning.data, weight_pruning, held, input, weight, work)
    asked = (*(_DATA if trains_input else ()), *(_WEIGHT if weight_pruning is not None else ()))
    if (why := _why_plain(op, pruning, work, input, weight)) is not None:
        note(layer, why, asked)
        remember(layer, input if why is SMALL else None)
        return None
    may_repeat = has_hooks()
    if held and not may_repeat:
        remember(layer, input)
        return None
    chooser, site = current_chooser(), make_site(computed_dtype(input))
    sites = {"data": site}
    if weight_pruning is not None:
        sites["weight"] = site._replace(pruning=weight_pruning, gradient="weight")
    if not may_repeat and pruning.backend == "auto" and _all_exact(layer, chooser, sites, asked, work):
        # A similar call may need a gradient that this call does not need.
        needs_all = pruning.weight_grad is None or (trains_input and trains_weight)
        remember(layer, input if needs_all else None)
        return None
    of_weight = None if weight_pruning is None else Part(weight_pruning, sites["weight"])
    return Call(op, Part(pruning.data, site), of_weight, held, layer, chooser)


def _check_kernels(
    op: str, pruning: Pruning, trains_input: bool, weight_pruning: Pruning | None, device: torch.device
) -> None:
    available = methods_on(device.type)
    for part in (pruning.data if trains_input else None, weight_pruning):
        if part is None or part.is_identity:
            continue
        if device.type not in _DEVICES:
            raise ValueError(
                f'{op}: backend="{pruning.backend}" expected tensors on cpu or cuda, got {device.type}; use '
                'backend="auto", which leaves the gradients exact there'
            )
        if part.method not in available:
            raise ValueError(
                f'{op}: backend="{pruning.backend}" expected a method that prunes on {device.type} '
                f'({", ".join(available)}), got {part.method}; use one of them, or backend="auto"'
            )


def _trained(tensor: Tensor) -> bool:
    """Returns whether a tensor needs a gradient. In a transform, a gradient at any level counts."""
    if torch.compiler.is_compiling():
        return tensor.requires_grad
    if torch._C._are_functorch_transforms_active():
        return _requires_grad(tensor)
    if type(tensor) in _PLAIN_TYPES:
        return tensor.requires_grad
    with torch._C.DisableTorchFunctionSubclass():  # some subclasses refuse the question
        return tensor.requires_grad


def _why_plain(op: str, pruning: Pruning, work: int, input: Tensor, weight: Tensor) -> Decision | None:
    """Returns why the plain operator computes a call under ``auto``, or None if sdgp may compute it.

    Raises:
        ValueError: If pruning is forced and sdgp cannot prune the tensors.
    """
    auto = pruning.backend == "auto"
    if auto and work < LEAST_WORK:
        return SMALL
    if (unusual := _unusual(input, weight)) is not None:
        if auto:
            return Decision("plain", f"only plain tensors are pruned, this call had {unusual}")
        raise ValueError(
            f'{op}: backend="{pruning.backend}" expected plain tensors, got {unusual}; use backend="auto", or leave '
            "the layer out by the filter of sdgp.convert"
        )
    if auto and in_transform():
        return Decision("plain", "a torch.func transform or forward-mode differentiation")
    return None


def _all_exact(
    layer: Layer | None, chooser: Chooser, sites: Mapping[str, Site], asked: Sequence[str], work: int
) -> bool:
    """Returns whether it is known before the backward that nothing is pruned. If so, the layer notes the reasons."""
    exact = {}
    for gradient in asked:
        decision = chooser.foresee(sites[gradient], work)
        if decision is None or decision.prunes:
            return False
        exact[gradient] = decision
    for gradient, decision in exact.items():
        note(layer, decision, (gradient,))
    return True


def _leaves_python() -> bool:
    """Returns whether torch.export or torch.jit.trace records this call.

    They keep only the forward, which is the plain one, and it must not depend on any size.
    """
    return torch.compiler._is_exporting_flag or (not torch.compiler.is_compiling() and torch._C._is_tracing())


# No plain operator saves a tensor like this. If a checkpoint repeats the forward of a layer that was converted or
# reverted since, it finds the mark in the place of another tensor. It then raises an error.
# Hooks that compress saved tensors expect at least one number, so the mark is not empty.
_MARK = torch.ones(1, dtype=torch.float32, device="cpu")


def save(ctx: Any, weight: Tensor, input: Tensor, *, jvp: bool = False) -> None:
    """Saves what the backward needs. With a frozen weight this excludes the input.

    Args:
        jvp: saves the same for forward-mode differentiation, which always needs the input. Both must save the same
            tensors in the same order, because vmap keeps one list of their batch dimensions.
    """
    mark: tuple[Tensor, ...] = ()
    if not torch.compiler.is_compiling():
        mark = (_MARK,) if has_hooks() else ()
        ctx.set_materialize_grads(False)  # without an output gradient, the backward must give none, not zeros
    saved = *mark, weight, input if jvp or ctx.needs_input_grad[1] else None
    ctx.save_for_backward(*saved)
    if jvp:
        ctx.save_for_forward(*saved)


def _too_few(op: str, count: int, pruning: Pruning) -> Decision:
    return Decision("exact", f"{count} {_ALONG[op]}, fewer than m = {pruning.pattern.m}")


# These functions avoid nn.Module's __setattr__, which would take microseconds.

_DECISIONS = {"data": "decision", "weight": "weight_decision"}


def note(layer: Layer | None, decision: Decision, gradients: Sequence[str]) -> None:
    """Tells a layer what was decided for its data or weight gradient, unless it was reverted since the forward."""
    if layer is not None and "pruning" in vars(layer):
        for gradient in gradients:
            vars(layer)[_DECISIONS[gradient]] = decision


def remember(layer: Layer | None, plain_for: Tensor | None) -> None:
    """Tells a layer that the plain operator computes calls with an input like ``plain_for``; None: no calls."""
    if layer is not None and "pruning" in vars(layer):
        vars(layer)["plain_for"] = None if plain_for is None else signature(plain_for)


def in_transform() -> bool:
    """Returns whether a torch.func transform or forward-mode differentiation surrounds this call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _requires_grad(tensor: Tensor) -> bool:
    """Returns whether a tensor needs a gradient at any level of the transforms around this call."""
    while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def _is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is certainly plain. ``_unusual`` also recognizes a fake tensor that stands for one."""
    return (
        type(tensor) in _PLAIN_TYPES
        and tensor.dtype in PRUNED_DTYPES
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _unusual(input: Tensor, weight: Tensor) -> str | None:
    """Describes the tensor that sdgp cannot prune, because it is not just numbers in memory. None if there is none."""
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


def _compiled(
    op: str,
    data: Pruning,
    weight_pruning: Pruning | None,
    held: str,
    input: Tensor,
    weight: Tensor,
    work: int,
) -> Call | None:
    """Decides under torch.compile, while the forward is traced. A recomputation is part of the same graph."""
    if held:
        return None

    def product(gradient: str, pruning: Pruning | None) -> str:
        if pruning is None or pruning.is_identity:
            return "exact"
        if pruning.backend not in ("auto", "pruned"):
            return pruning.backend
        large = work >= LEAST_WORK
        dtype = computed_dtype(input)
        if large and static_rule(op, gradient, pruning, input.device, dtype, weight.shape, input.numel()):
            return "sparse"
        return "exact" if pruning.backend == "auto" else "dense"

    of_data = product("data", data if input.requires_grad else None)
    of_weight = product("weight", weight_pruning)
    if of_data == of_weight == "exact":
        return None
    return Call(
        op,
        Part(data, product=of_data),
        None if weight_pruning is None else Part(weight_pruning, product=of_weight),
    )


def exponent(size: int) -> int:
    """Returns the exponent of the next power of two."""
    return max(size - 1, 0).bit_length()


def site_of(op: str, dtype: torch.dtype, pruning: Pruning, input: Tensor, weight: Tensor, **own: Any) -> Site:
    """Returns the site of a layer's data gradient. ``own`` are the fields that other kinds of layers lack."""
    return Site(
        op=op,
        device=input.device,
        dtype=dtype,
        threads=torch.get_num_threads(),
        pruning=pruning.data,
        weight_shape=tuple(int(size) for size in weight.shape),  # a tracer's sizes may be symbols, which have no hash
        weight_contiguous=weight.is_contiguous(),
        values=exponent(input.numel()),
        **own,
    )
