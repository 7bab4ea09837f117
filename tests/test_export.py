# SPDX-License-Identifier: BSD-3-Clause
"""Tests that exported models run outside Python or without sdgp, and compute the plain forward."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sdgp

pytestmark = pytest.mark.slow

# A process that cannot import sdgp runs the saved model.
ELSEWHERE = """
import sys
sys.modules["sdgp"] = None
import torch
path, data = sys.argv[1:]
model = torch.export.load(path).module() if path.endswith(".pt2") else torch.jit.load(path)
data = torch.load(data)
assert torch.equal(model(data["input"]), data["expected"])
"""


def model(backend: str = "pruned") -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(8 * 36, 12),
        nn.ReLU(),
        nn.Linear(12, 8),
    )
    return sdgp.convert(layers, "2:4", backend=backend, weight_grad="4:16")


def run_elsewhere(path: Path, converted: nn.Module, x: Tensor) -> None:
    data = path.with_suffix(".data")
    torch.save({"input": x, "expected": sdgp.revert(converted)(x).detach()}, data)
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(path), str(data)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", ["auto", "pruned", "sparse", "dense"])
def test_export(backend: str, tmp_path: Path) -> None:
    """An exported model must run for any batch size and backend: the size checks of auto must leave no trace."""
    converted, x = model(backend), torch.randn(2, 3, 6, 6)
    exported = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=2**20)},))
    assert "sdgp" not in exported.graph_module.code
    torch.export.save(exported, tmp_path / "model.pt2")
    run_elsewhere(tmp_path / "model.pt2", converted, torch.randn(5, 3, 6, 6))


@pytest.mark.parametrize("script", [False, True])
def test_torchscript(script: bool, tmp_path: Path) -> None:
    converted = model()
    plain = sdgp.revert(copy.deepcopy(converted))
    scripted = torch.jit.script(plain) if script else torch.jit.trace(converted, torch.randn(2, 3, 6, 6))
    assert not any(node.kind().startswith(("sdgp::", "prim::PythonOp")) for node in scripted.inlined_graph.nodes())
    scripted.save(str(tmp_path / "model.pt"))
    run_elsewhere(tmp_path / "model.pt", converted, torch.randn(5, 3, 6, 6))


def test_scripting_says_what_to_do() -> None:
    converted = model()
    with pytest.raises(RuntimeError, match=r"^torch.jit.script: expected a plain model, got a Conv2d of sdgp"):
        torch.jit.script(converted)
    assert type(converted[0]) is sdgp.Conv2d


@pytest.mark.filterwarnings("ignore")  # warnings of the exporter
def test_onnx() -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    import onnxruntime

    converted, x = model(), torch.randn(2, 3, 6, 6)
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(converted, (x,), dynamo=True, dynamic_shapes=batch, verbose=False)
    assert program is not None
    assert all(node.domain == "" for node in program.model.graph)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 6, 6)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), converted(x).detach(), rtol=1e-4, atol=1e-5)


class _Prunes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sdgp.prune_nm(x.transpose(0, 1).sin(), 2, 4, 0, "rescale").relu()


@pytest.mark.filterwarnings("ignore")  # warnings of inductor
def test_a_model_that_prunes_keeps_the_op(tmp_path: Path) -> None:
    x = torch.randn(6, 16)
    exported = torch.export.export(_Prunes(), (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    assert "torch.ops.sdgp.prune_nm.default" in exported.graph_module.code
    x = torch.randn(9, 16)
    torch.testing.assert_close(exported.module()(x), _Prunes()(x))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), _Prunes()(x))
