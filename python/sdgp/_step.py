# SPDX-License-Identifier: BSD-3-Clause
"""A training step of somebody's model on somebody's batch, run to be measured and then undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_Layer = TypeVar("_Layer", bound=nn.Module)


#: ``loss(model, batch)``: from a model and a batch to the scalar that backward begins with.
Loss: TypeAlias = Callable[[Any, Any], Tensor]


def compute_loss(op: str, model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The forward, by ``loss(model, batch)``, else by calling the model with ``batch``: a tensor, a tuple of positional
    or a mapping of keyword arguments.

    Raises:
        ValueError: ``op: requirement, got actual``, where there is nothing to differentiate.
    """
    if loss is not None:
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{op}: expected loss(model, batch) to return a scalar tensor with a gradient, got {got}")
        return value
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    return _default_loss(op, output)


def run_step(op: str, model: nn.Module, batch: Any, loss: Loss | None) -> None:
    """Forward, see ``compute_loss``, and backward."""
    torch.autograd.backward(compute_loss(op, model, batch, loss))


class Hook:
    """Calls a function. A copy of it, made with the module that it hangs on, calls nothing: what measures a model
    neither follows its copies nor goes into its pickles."""

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self._call is None else self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)


class Handles:
    """Handles of hooks; leaving them as a context removes the hooks."""

    def __init__(self, handles: Iterable[RemovableHandle] = ()) -> None:
        self._handles = list(handles)

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Handles:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def on_gradient(
    layers: Iterable[_Layer], receive: Callable[[_Layer, Tensor, Tensor], None], *, weights: bool = False
) -> Handles:
    """Calls ``receive(layer, grad_output, input)`` in the backward of each call of a layer that has a data gradient,
    until the handles are removed.

    Args:
        weights: also of each call of a layer that has only a weight gradient. ``input`` is then the detached input,
            where there is a weight gradient and nobody changed the input in place since. Otherwise it is on the meta
            device: its shape and strides count, and keeping its values would cost memory. Either way
            ``input.requires_grad`` says whether there is a data gradient.
    """

    def after_forward(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        input = (*args, *kwargs.values())[0]
        of_weight = weights and layer.weight.requires_grad
        if torch.compiler.is_compiling() or output.is_nested:
            return
        if not (output.requires_grad and (input.requires_grad or of_weight)):
            return
        shape = torch.empty_strided(input.shape, input.stride(), device="meta").requires_grad_(input.requires_grad)
        # No reference to the input itself: if it is changed in place, its new history leads to this hook.
        values = input.detach().requires_grad_(input.requires_grad) if of_weight else shape
        version = input._version

        def run(grad: Tensor) -> None:
            receive(layer, grad.detach(), values if values._version == version else shape)

        hook: Any = output.register_hook
        hook(run)

    return Handles(layer.register_forward_hook(Hook(after_forward), with_kwargs=True) for layer in layers)


def stand_in(shape: Tensor, grad_output: Tensor) -> Tensor:
    """A tensor like ``shape``, which is on the meta device, where the gradient is; its values are whatever they are."""
    return torch.empty_strided(shape.shape, shape.stride(), dtype=grad_output.dtype, device=grad_output.device)


def _default_loss(op: str, output: Any) -> Tensor:
    if isinstance(getattr(output, "loss", None), Tensor):
        loss: Tensor = output.loss
        return loss
    tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point() and tensor.requires_grad]
    if not tensors:
        raise ValueError(f"{op}: expected the model to return a tensor with a gradient, got none; pass loss=")
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, (tuple, list)):
        yield from (tensor for value in output for tensor in _tensors(value))


@contextmanager
def state_kept(model: nn.Module, *others: Tensor) -> Iterator[None]:
    """Puts gradients, those of ``others`` too, buffers, generators and the layers' decisions back as they were."""
    parameters = [*model.parameters(), *others]
    gradients = [parameter.grad for parameter in parameters]
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    decisions = [
        (vars(layer), name, vars(layer)[name])
        for layer in model.modules()
        for name in ("decision", "weight_decision")
        if name in vars(layer)
    ]
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for place, name, buffer, before in buffers:
                place[name] = buffer  # a forward may have put another there
                buffer.copy_(before)
        for attributes, name, decision in decisions:
            if name in attributes:  # not reverted within
                attributes[name] = decision
