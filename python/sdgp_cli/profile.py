# SPDX-License-Identifier: BSD-3-Clause
"""``sdgp profile``: measures what converting a model would save here, for each layer and for the whole step."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdgp import advise, convert, profile, report
from sdgp._machine import environment
from sdgp._profile import LayerProfile, Profile

from . import CommandError, Report
from .models import build, describe_error
from .options import begin, parse_dtype
from .progress import progress


def run(args: argparse.Namespace) -> Report:
    if args.advise:
        _check_no_settings(args)
    else:
        args.pattern, args.method, args.backend = args.pattern or "2:4", args.method or "mvue", args.backend or "auto"
    device = begin(args.device, args.threads)
    dtype = parse_dtype(args.dtype, device)
    model, given = build(args.model)
    if given is not None:
        _check_no_shape(args)
    try:
        batch = _to(_batch(args, model) if given is None else given, args.channels_last, device, dtype)
        model = model.to(device, dtype)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
    except RuntimeError as error:  # out of memory, or a model on the meta device, which has no values
        raise CommandError(f"expected model and batch to fit on {device}, got {describe_error(error)}") from error
    what = _describe(batch)
    if args.advise:
        return _advised(args, model, [batch] if given is not None else [batch, _other(batch)], what, device)
    result = _profile(args, model, batch, what)
    return {
        "model": args.model,
        "input": what,
        "device": str(device),
        "pattern": args.pattern,
        "method": args.method,
        "weight_grad": args.weight_grad,
        "backend": args.backend,
        "rounds": args.rounds,
        "exact_ms": result.exact_ms,
        "converted_ms": result.step_ms,
        "saved": 1 - result.step_ms / result.exact_ms,
        "layers": [row._asdict() for row in result],
        "plain": [{"layer": row.layer, "why": row.why} for row in report(model) if not row.pattern],
        "machine": environment(),
    }


def show(report: Report) -> str:
    if "advice" in report:
        return str(report["advice"])
    table = Profile(LayerProfile(**row) for row in report["layers"])
    table.exact_ms, table.step_ms = report["exact_ms"], report["converted_ms"]
    machine = report["machine"]
    head = f"{report['model']}, {report['input']}, {report['device']}; {report['method']} {report['pattern']}"
    head += f", weight gradients {report['weight_grad']}" if report["weight_grad"] else ""
    reasons = Counter(row["why"] for row in report["plain"])
    return "\n".join(
        [
            f"{head}, backend {report['backend']}; forward and backward, shortest of {report['rounds']} rounds",
            f"{machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}, sdgp {machine['sdgp']}",
            "",
            str(table),
            *(f"{count} left plain: {reason}" for reason, count in reasons.items()),
        ]
    )


def _advised(args: argparse.Namespace, model: nn.Module, batches: list[Any], what: str, device: torch.device) -> Report:
    with _told(what, "advise"), progress(5) as begin:
        methods = None if args.method is None else (args.method,)
        plan = advise(model, *batches, methods=methods, rounds=args.rounds, progress=begin)
    fresh = "" if len(batches) == 1 else "weights and data are random, and trained models bear pruning better\n"
    return {
        "model": args.model,
        "input": what,
        "device": str(device),
        "pays": plan.pays,
        "verdict": plan.verdict,
        "saved": plan.saved,
        "limit": plan.limit,
        "noise": plan.noise,
        "net": plan.net,
        "step_ms": plan.step_ms,
        "plan": dict(plan),
        "candidates": [row._asdict() for row in plan.candidates],
        "advice": f"{args.model}, {what}, {device}\n{fresh}{plan}",
        "machine": environment(),
    }


def _other(batch: Tensor) -> Tensor:
    """Returns another random batch of the same shape and dtype."""
    if batch.is_floating_point():
        return torch.randn_like(batch)
    return batch.flatten()[torch.randperm(batch.numel(), device=batch.device)].view_as(batch)


def _profile(args: argparse.Namespace, model: nn.Module, batch: Any, what: str) -> Profile:
    with _told(what, "convert", "pattern"):
        convert(model, args.pattern, args.method, backend=args.backend, weight_grad=args.weight_grad)
    rows = report(model)
    if not any(row.pattern for row in rows):
        reasons = [f"{count} left plain: {why}" for why, count in Counter(row.why for row in rows).items()]
        raise CommandError(f"expected a model with a layer that prunes, got {', '.join(reasons) or 'none'}")
    # profile prints its table, but show() prints it too
    with _told(what, "profile"), contextlib.redirect_stdout(io.StringIO()):
        return profile(model, batch, rounds=args.rounds)


@contextlib.contextmanager
def _told(what: str, *ops: str) -> Iterator[None]:
    """Turns an exception inside the context into a CommandError: invalid arguments of ``ops``, or a failing model."""
    try:
        yield
    except Exception as error:
        op, _, message = str(error).partition(": ")
        if isinstance(error, ValueError) and op in ops:
            raise CommandError(message) from error
        raise CommandError(
            f"expected the model to run forward and backward on {what} "
            f"(--batch, --image, --tokens, --input), got {describe_error(error)}"
        ) from error


def _check_no_settings(args: argparse.Namespace) -> None:
    names = {"pattern": args.pattern, "backend": args.backend, "weight-grad": args.weight_grad}
    if given := [f"--{name}" for name, value in names.items() if value is not None]:
        raise CommandError(f"expected --advise to choose by itself, got {', '.join(given)} too")


def _check_no_shape(args: argparse.Namespace) -> None:
    options = [f"--{name}" for name in ("batch", "image", "tokens", "input") if getattr(args, name) is not None]
    if options:
        raise CommandError(f"expected the batch that {args.model} returns to be all, got {', '.join(options)} too")


def _batch(args: argparse.Namespace, model: nn.Module) -> Tensor:
    if args.input is not None and args.batch is not None:
        raise CommandError(f"expected --input to name the whole shape, got --batch {args.batch} too")
    samples = args.batch or 8
    if args.tokens is not None:
        tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
        if not tables:
            raise CommandError("expected a model with an nn.Embedding for --tokens, got one without")
        return torch.randint(max(tables), (samples, args.tokens))
    if args.input is not None:
        return torch.randn(args.input)
    channels, *size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))  # timm models have default_cfg
    return torch.randn(samples, channels, *([args.image] * 2 if args.image else size))


def _to(batch: Any, channels_last: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """Moves all tensors of a nested batch to the device, dtype and memory format."""
    if isinstance(batch, Mapping):
        return {key: _to(value, channels_last, device, dtype) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_to(value, channels_last, device, dtype) for value in batch]
    if not isinstance(batch, Tensor):
        return batch
    batch = batch.to(device, dtype if batch.is_floating_point() else batch.dtype)
    return batch.contiguous(memory_format=torch.channels_last) if channels_last and batch.ndim == 4 else batch


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"{'x'.join(map(str, batch.shape))} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{key} {_describe(value)}" for key, value in batch.items())
    return ", ".join(map(_describe, batch)) if isinstance(batch, list) else repr(batch)
