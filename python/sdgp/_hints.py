# SPDX-License-Identifier: BSD-3-Clause
"""The notes of ``sdgp.advise``: what saves time without noise, and what makes its answer less certain."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ._pattern import UNBIASED_METHODS
from ._plan import Candidate
from ._rules import LEAST_WORK
from ._steps import Steps
from ._study import Study

#: The hint for a plan with convolutions. recipes/worth measured it.
START_EXACT = (
    "an untrained convolutional network suffers most: keep the first quarter of its training exact, with "
    "schedule = sdgp.Schedule(model, total=epochs, exact_first=0.25), and schedule.step() after each epoch"
)

#: The saving by bfloat16 from which a note mentions it. Smaller ones may be measuring errors.
_LEAST_SAVING = 0.1


def hints(
    steps: Steps, study: Study, optimizer: torch.optim.Optimizer | None, candidates: list[Candidate]
) -> Iterator[str]:
    """Yields one sentence for each thing that the user can change or should know."""
    if steps.bfloat16_saved > _LEAST_SAVING:
        saved = f"{steps.bfloat16_saved:.0%}"
        yield f"plain bfloat16 saves {saved} of a step: use torch.autocast inside loss= first, and ask again"
    if steps.ignored:
        yield f"batches of another size than the first, which were ignored: {steps.ignored}"
    if len(steps.batches) == 1:
        yield "one batch gives the noise only to a factor of about two: pass more batches"
    if optimizer is not None and steps.norm.kind == "euclidean" and "betas" in optimizer.defaults:
        yield "noise is measured in the Euclidean norm: the optimizer is not Adam, or has made no step"
    unknown = [row for row in candidates if row.saved_ms > 0 and math.isnan(row.noise)]
    if zero := {(row.layer, row.gradient) for row in unknown if math.isnan(row.error)}:
        yield f"gradients that are zero in this batch: {len(zero)}; train a few steps, and ask again"
    if any(row.gradient == "data" and not math.isnan(row.error) for row in unknown):
        why = study.unmeasured or "a reentrant checkpoint hides them"
        yield f"the noise of data gradients could not be measured: {why}"
    if steps.without_gradient:
        yield f"parameters that get no gradient: {steps.without_gradient}; set requires_grad=False"
    if idle := _idle(steps, optimizer):
        yield f"parameters with a gradient that the optimizer does not use: {idle}; set requires_grad=False"
    useless = [study.names[module] or "(model)" for module, factor in study.amplified.items() if factor == 0]
    if useless:
        listed = ", ".join(useless[:3]) + (", …" if len(useless) > 3 else "")
        yield f"the data gradient of {listed} reaches no trained parameter: detach the input"
    if 0 < study.largest_work < LEAST_WORK and all(row.sparse_ms is None for row in candidates):
        times = math.ceil(LEAST_WORK / study.largest_work)
        yield f"the largest layer is too small to gain: use a batch {times} times as large"
    if any(row.method not in UNBIASED_METHODS for row in candidates):
        yield "biased methods: their errors do not average out"


def _idle(steps: Steps, optimizer: torch.optim.Optimizer | None) -> int:
    """Returns the number of parameters that require a gradient and are in no group of the optimizer."""
    if optimizer is None:
        return 0
    used = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return sum(p.requires_grad and p not in used for p in steps.model.parameters())
