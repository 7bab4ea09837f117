# SPDX-License-Identifier: BSD-3-Clause
"""Tests ``exact_below`` of sdgp.watch: which layers it sets aside, and what its state keeps."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn

import sdgp


def step(model: nn.Module) -> None:
    model(torch.randn(4, 8, requires_grad=True)).square().sum().backward()


def pair() -> nn.Module:
    return sdgp.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "1:8", "random", backend="pruned")


def harmed() -> tuple[nn.Module, sdgp.Watch]:
    model = pair()
    return model, sdgp.watch(model, every=1, window=3, exact_below=0.9)


def test_sets_harmed_layers_aside() -> None:
    model, watch = harmed()
    for _ in range(3):
        assert not watch.set_aside
        step(model)
    assert list(watch.set_aside) == ["0", "1"]
    assert re.fullmatch(r"set aside at step 2, .*0\.\d\d < exact_below=0\.9", watch.set_aside["0"])
    assert [row.note for row in sdgp.report(model)] == [f"exact: {why}" for why in watch.set_aside.values()]
    assert str(watch).count("exact: set aside") == 2
    x = torch.randn(4, 8, requires_grad=True)
    dense = sdgp.revert(copy.deepcopy(model))
    assert torch.equal(*(torch.autograd.grad(net(x).square().sum(), x)[0] for net in (model, dense)))
    assert watch["0"]["step"] == [0, 1, 2]
    assert "set aside" not in str(sdgp.report(sdgp.convert(model, "2:4")))


def test_a_good_layer_stays() -> None:
    model = sdgp.convert(nn.Linear(8, 8), "7:8", "magnitude", backend="pruned")
    watch = sdgp.watch(model, every=1, window=2, exact_below=0.9)
    for _ in range(4):
        step(model)
    assert watch["(model)"]["cosine"][-1] > 0.95
    assert not watch.set_aside


def test_goes_on_from_a_state_dict() -> None:
    model, watch = harmed()
    for _ in range(4):
        step(model)
    other, restored = harmed()
    restored.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert (restored.step, restored.set_aside) == (4, watch.set_aside)
    assert [row.note for row in sdgp.report(other)] == [row.note for row in sdgp.report(model)]


def test_the_old_name_warns_and_works() -> None:
    model = pair()
    with pytest.warns(FutureWarning, match="exact_below") as warned:
        watch = sdgp.watch(model, every=1, window=1, dense_below=0.9)
    assert warned[0].filename == __file__
    step(model)
    assert list(watch.set_aside) == ["0", "1"]


def test_a_layer_that_is_converted_again_is_judged_anew() -> None:
    model, watch = harmed()
    for _ in range(3):
        step(model)
    assert list(watch.set_aside) == ["0", "1"]
    sdgp.convert(model, "7:8", backend="pruned")
    for _ in range(4):
        step(model)
    assert not watch.set_aside
    assert watch.state_dict()["set_aside"] == {}


def test_a_watch_that_is_restored_frees_only_its_own_layers() -> None:
    model, watch = harmed()
    for _ in range(3):
        step(model)
    reasons = list(watch.set_aside.values())
    other = sdgp.watch(model, every=1)
    other.load_state_dict(other.state_dict())
    assert [layer.held for layer in model] == reasons
