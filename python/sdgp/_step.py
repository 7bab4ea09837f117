# SPDX-License-Identifier: BSD-3-Clause
"""Runs a training step of a user's model on a user's batch, to measure it, and then undoes it."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

_Layer = TypeVar("_Layer", bound=nn.Module)


#: ``loss(model, batch)`` returns the scalar at which backward begins.
Loss: TypeAlias = Callable[[Any, Any], Tensor]

#: Receives the output gradient and the input of a layer call, in its backward.
Receive: TypeAlias = Callable[[Tensor, Tensor], None]


def check_loss(op: str, loss: object) -> None:
    """Raises ValueError if ``loss`` cannot be a function of model and batch."""
    if isinstance(loss, nn.modules.loss._Loss) or not (loss is None or callable(loss)):
        raise ValueError(f"{op}: expected loss to be a function of model and batch, got {type(loss).__name__}")


def compute_loss(op: str, model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """Runs the forward and returns the loss: ``loss(model, batch)`` if ``loss`` is given.

    Otherwise it calls the model with ``batch``: a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        ValueError: If there is nothing to differentiate: ``op: requirement, got actual``.
    """
    check_loss(op, loss)
    if loss is not None:
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            if isinstance(value, Tensor) and value.numel() == 1:
                got = "one without" + ("" if torch.is_grad_enabled() else ", under torch.no_grad()")
            raise ValueError(f"{op}: expected loss(model, batch) to return a scalar tensor with a gradient, got {got}")
        return value
    try:
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except TypeError as error:
        raise ValueError(
            f"{op}: expected a batch that holds the arguments of the model, or loss=, a function of model and batch, "
            f"got {error}"
        ) from error
    return _default_loss(op, output)


def run_step(op: str, model: nn.Module, batch: Any, loss: Loss | None) -> None:
    """Runs a forward (``compute_loss``) and its backward (``run_backward``)."""
    run_backward(op, compute_loss(op, model, batch, loss), model.parameters())


def run_backward(op: str, value: Tensor, parameters: Iterable[Tensor]) -> None:
    """Runs a backward.

    Raises:
        ValueError: If it changed a parameter, so that to measure would be to train: ``op: requirement, got actual``.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    versions = [parameter._version for parameter in trained]
    torch.autograd.backward(value)
    if versions != [parameter._version for parameter in trained]:
        raise _steps_in_backward(op, "one step by an optimizer inside it")


def check_optimizer(op: str, parameters: Iterable[Tensor]) -> None:
    """Raises ValueError if hooks may step an optimizer in the backward."""
    if any(p._post_accumulate_grad_hooks or hasattr(p, "_in_backward_optimizers") for p in parameters):
        raise ValueError(f"{op}: expected an optimizer that steps after backward, got hooks that may step within it")


def _steps_in_backward(op: str, got: str) -> ValueError:
    return ValueError(f"{op}: expected a backward that leaves the parameters as they are, got {got}")


class Hook:
    """A hook that calls a function. A copy of it, made when its module is copied or pickled, calls nothing.

    So a measurement of a model neither follows copies of the model nor gets into its pickles.
    """

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self._call is None else self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)


class Handles:
    """Handles of hooks. As a context manager, this removes the hooks at the end of the block."""

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
    layers: Iterable[_Layer], begin: Callable[[_Layer], Receive | None], *, weights: bool = False
) -> Handles:
    """Calls ``begin`` after each forward that has a data gradient, until the handles are removed.

    Calls under torch.compile or the transforms of torch.func, and batched gradients, are left out.

    Args:
        begin: ``begin(layer)`` returns a function, which the backward of that forward calls with the output gradient
            and the input, or None.
        weights: include layer calls that have only a weight gradient. ``input`` is then the detached input if there is
            a weight gradient and nobody has changed the input in place since. Otherwise ``input`` is on the meta
            device: only its shape and strides matter, and keeping its values would cost memory. In both cases
            ``input.requires_grad`` says whether there is a data gradient.
    """

    def after_forward(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        input = (*args, *kwargs.values())[0]
        of_weight = weights and layer.weight.requires_grad
        if output.is_nested or _is_transformed(output):
            return
        if not (output.requires_grad and (input.requires_grad or of_weight)):
            return
        receive = begin(layer)
        if receive is None:
            return
        with _disable_current_modes():  # a checkpoint's mode expects the same operators whether this hook exists or not
            shape = torch.empty_strided(input.shape, input.stride(), device="meta").requires_grad_(input.requires_grad)
            # Keep no reference to the input itself: after a change in place, its new history would lead to this hook.
            values = input.detach().requires_grad_(input.requires_grad) if of_weight else shape
        version = input._version

        def run(grad: Tensor) -> None:
            if not _is_transformed(grad):
                with _disable_current_modes():
                    receive(grad.detach(), values if values._version == version else shape)

        hook: Any = output.register_hook
        hook(run)

    return Handles(layer.register_forward_hook(Hook(after_forward), with_kwargs=True) for layer in layers)


def _is_transformed(tensor: Tensor) -> bool:
    """Returns whether torch.compile, torch.func or a batched gradient (``is_grads_batched``) surrounds this call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def note_weights(layers: Iterable[nn.Module]) -> tuple[dict[nn.Module, Tensor], Handles]:
    """Notes the weight that a parametrization computes in each forward, until the handles are removed.

    To read it once more may train the parametrization, or draw another one.

    Returns:
        The last weight of each layer with a parametrized one, and the handles.
    """
    noted: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, parametrization: nn.Module, args: tuple[()], weight: Tensor) -> None:
        if not _is_transformed(weight):
            with _disable_current_modes():
                noted[layer] = weight.detach()

    parametrized: Any = [layer for layer in layers if parametrize.is_parametrized(layer, "weight")]
    return noted, Handles(
        layer.parametrizations.weight.register_forward_hook(Hook(functools.partial(note, layer)))
        for layer in parametrized
    )


def stand_in(shape: Tensor, grad_output: Tensor) -> Tensor:
    """Returns an uninitialized tensor like ``shape`` (a meta tensor), with the dtype and device of the gradient."""
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


def generators_kept(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Restores PyTorch's generators after the block: the CPU's, and those of the GPUs that hold ``tensors``."""
    return torch.random.fork_rng(sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda}))


# The number of ``state_kept`` blocks that are running: their steps are no training.
_measurements = 0


def is_measuring() -> bool:
    """Returns whether a forward that runs now is a part of a measurement of ``advise``, ``Budget`` or ``profile``."""
    return _measurements > 0


@contextmanager
def state_kept(op: str, model: nn.Module, *others: Tensor) -> Iterator[None]:
    """Restores gradients (also of ``others``), buffers, generators and the layers' decisions after the block.

    The generators are PyTorch's and the global ones of Python and NumPy. It restores all that it can if something
    cannot be restored. Inside the block, ``is_measuring`` is true.

    Raises:
        ValueError: If the hook of a parameter changed it: ``op: requirement, got actual``. It is restored too.
    """
    global _measurements
    parameters = [*model.parameters(), *others]
    with ExitStack() as stack:
        _measurements += 1
        stack.callback(_end_measurement)
        hooked = [(parameter, parameter.detach().clone()) for parameter in parameters if parameter._backward_hooks]
        stack.callback(_restore_parameters, op, hooked)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    stack.callback(_restore_buffer, module._buffers, name, buffer, buffer.detach().clone())
            for name in ("decision", "weight_decision"):
                if name in vars(module):
                    stack.callback(_restore_decision, vars(module), name, vars(module)[name])
        for parameter in parameters:
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        stack.enter_context(generators_kept(parameters))
        stack.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        yield


def _end_measurement() -> None:
    global _measurements
    _measurements -= 1


def _restore_parameters(op: str, before: list[tuple[Tensor, Tensor]]) -> None:
    changed = [(parameter, values) for parameter, values in before if not _equal(parameter, values)]
    for parameter, values in changed:
        parameter.data.copy_(values)
    if changed:
        raise _steps_in_backward(op, "hooks that change them")


def _restore_buffer(buffers: dict[str, Tensor | None], name: str, buffer: Tensor, before: Tensor) -> None:
    buffers[name] = buffer  # a forward may have replaced it
    if not _equal(buffer, before):
        with torch.inference_mode(buffer.is_inference()):
            buffer.data.copy_(before)  # keeps its version: an earlier forward may have saved these values


def _restore_decision(attributes: dict[str, Any], name: str, decision: object) -> None:
    if name in attributes:  # the layer was not reverted inside the block
        attributes[name] = decision


def _equal(one: Tensor, other: Tensor) -> bool:
    try:
        return torch.equal(one, other)
    except RuntimeError:  # no such operator for meta or sparse tensors
        return False
