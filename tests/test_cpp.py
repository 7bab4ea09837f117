# SPDX-License-Identifier: BSD-3-Clause
"""Tests C++ programs against the installed package, without Python in their processes.

The programs are the examples, and every layer next to its twin in Python.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import close
from torch import Tensor, nn

import sdgp

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="needs cmake and a C++ compiler"),
]
HERE = Path(__file__).parent


def output(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("programs")
    paths = f"-DCMAKE_PREFIX_PATH={sdgp.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    root = f"-DTORCH_ROOT={Path(torch.__file__).parent if torch.version.cuda else ''}"
    output("cmake", "-S", HERE / "installed", "-B", build, paths, root)
    output("cmake", "--build", build, "--parallel", "2")
    return build


@pytest.mark.parametrize("program", ["examples/run_torchscript", "examples/train", "examples/run_aot_inductor"])
def test_links_no_python(program: str, programs: Path) -> None:
    libraries = output("ldd", programs / program)
    assert "libsdgp.so" in libraries
    assert not re.search(r"lib(torch_)?python", libraries)


class _Scripted(nn.Module):
    """A module that holds an input and its expected output, and whose forward calls prune_nm."""

    def __init__(self, input: Tensor, expected: Tensor) -> None:
        super().__init__()
        self.register_buffer("input", input)
        self.register_buffer("expected", expected)

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.sdgp.prune_nm(input, 2, 4, 1, "rescale")


def test_torchscript(programs: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 8, 3, 3)
    torch.jit.script(_Scripted(x, sdgp.prune_nm(x, 2, 4, 1, "rescale"))).save(tmp_path / "model.pt")
    assert output(programs / "examples/run_torchscript", tmp_path / "model.pt").split() == [sdgp.__version__]


class _Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.sdgp.prune_nm(self.linear(x), 2, 4, -1, "rescale").relu()


@pytest.mark.filterwarnings("ignore")  # warnings of inductor
def test_aot_inductor(programs: Path, tmp_path: Path) -> None:
    model, x = _Calls().eval(), torch.randn(4, 8)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        torch.jit.script(_Scripted(x, model(x))).save(tmp_path / "example.pt")
    output(programs / "examples/run_aot_inductor", package, tmp_path / "example.pt")


def network(method: str, weight_grad: str) -> nn.Module:
    """Makes the network of examples/cpp/train.cpp."""
    settings: dict[str, Any] = {"method": method, "backend": "pruned", "weight_grad": (weight_grad, method)}
    net = nn.Sequential()
    net.conv1 = sdgp.Conv2d(3, 8, 3, padding=1, **settings)
    net.add_module("relu1", nn.ReLU())
    net.conv2 = sdgp.Conv2d(8, 16, 3, stride=2, **settings)
    net.add_module("relu2", nn.ReLU())
    net.add_module("flatten", nn.Flatten())
    net.hidden = sdgp.Linear(16 * 3 * 3, 32, **settings)
    net.add_module("relu3", nn.ReLU())
    net.head = nn.Linear(32, 10)
    return net


@pytest.mark.parametrize("weight_grad", ["1:1", "4:16"])
@pytest.mark.parametrize("method", ["magnitude", "rescale", "rescale_group", "random", "mvue", "unstructured"])
def test_trains_as_python_does(method: str, weight_grad: str, programs: Path, tmp_path: Path) -> None:
    """C++ must give Python's loss at each step and Python's final weights. The same seed must give the same draws."""
    torch.manual_seed(1)
    net, images, labels = network(method, weight_grad), torch.randn(6, 16, 3, 8, 8), torch.randint(0, 10, (6, 16))
    data = {"images": images, "labels": labels, **{name: weight.data for name, weight in net.named_parameters()}}
    torch.save(data, tmp_path / "data.pt")
    said = output(programs / "examples/train", tmp_path / "data.pt", method, weight_grad)

    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    losses = []
    torch.manual_seed(0)
    for batch, targets in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(net(batch), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [float(line.split()[-1]) for line in said.splitlines()] == pytest.approx(losses, rel=1e-5)
    for got, weight in zip(torch.load(tmp_path / "data.pt.trained"), net.parameters(), strict=True):
        torch.testing.assert_close(got, weight.detach(), rtol=1e-5, atol=1e-6)


def linear(**changes: Any) -> dict[str, Any]:
    case = {"op": "linear", "input": torch.randn(5, 3, 12), "weight": torch.randn(16, 12), "bias": torch.randn(16)}
    return {**case, "pattern": "2:4", "method": "magnitude", "backend": "pruned", **changes}


def conv2d(**changes: Any) -> dict[str, Any]:
    case = {"op": "conv2d", "input": torch.randn(2, 4, 7, 6), "weight": torch.randn(8, 4, 3, 3)}
    window = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    return {**case, **window, "pattern": "2:4", "method": "magnitude", "backend": "pruned", **changes}


PRUNED_WEIGHT_GRADIENT = {"weight_grad": "3:8", "weight_grad_method": "magnitude"}
CASES = {
    **{f"linear {backend} {method}": linear(backend=backend, method=method, weight_grad="2:4",
                                            weight_grad_method=method)
       for backend in ("pruned", "sparse", "dense")
       for method in ("magnitude", "rescale", "rescale_group", "random", "mvue", "unstructured")},
    **{f"conv2d {backend} {method}": conv2d(backend=backend, method=method, weight_grad="4:16",
                                            weight_grad_method=method)
       for backend in ("pruned", "sparse", "dense")
       for method in ("magnitude", "rescale", "rescale_group", "random", "mvue", "unstructured")},
    "linear large": linear(input=torch.randn(4096, 128), weight=torch.randn(64, 128), bias=torch.randn(64)),
    "linear 1-d": linear(input=torch.randn(12)),
    "linear with a bias matrix": linear(input=torch.randn(4, 12), bias=torch.randn(4, 16)),
    "linear without features": linear(input=torch.randn(4, 0), weight=torch.randn(16, 0)),
    "linear 4:4": linear(pattern="4:4"),
    "linear frozen": linear(frozen=True),
    "linear float64 3:5": linear(pattern="3:5", **{name: torch.randn(*size, dtype=torch.float64) for name, size in
                                                   {"input": (4, 12), "weight": (16, 12), "bias": (16,)}.items()}),
    "linear autocast": linear(autocast=True),
    **{f"linear's weight gradient {name}": linear(pattern="4:4", **PRUNED_WEIGHT_GRADIENT, **changes)
       for name, changes in {
           "of fewer rows than m": {"input": torch.randn(3, 12)},
           "of one row": {"input": torch.randn(12)},
           "transposed": {"weight": torch.randn(12, 16).t()},
           "transposed, dense": {"weight": torch.randn(12, 16).t(), "backend": "dense"},
           "frozen": {"frozen": True},
           "autocast": {"autocast": True},
           "in exact": {"backend": "exact"},
       }.items()},
    **{f"conv2d's weight gradient {name}": conv2d(pattern="4:4", **PRUNED_WEIGHT_GRADIENT, **changes)
       for name, changes in {
           "of fewer pixels than m": {"input": torch.randn(2, 4, 3, 3), "padding": [0, 0]},
           "beside a bias": {"bias": torch.randn(8)},
           "in groups, strided": {"weight": torch.randn(12, 2, 3, 3), "groups": 2, "stride": [2, 1]},
           "channels_last": {"input": torch.randn(2, 4, 7, 6).to(memory_format=torch.channels_last)},
           "unbatched": {"input": torch.randn(4, 7, 6), "backend": "dense"},
           "frozen": {"frozen": True, "bias": torch.randn(8)},
           "autocast": {"autocast": True},
       }.items()},
    "conv2d bias": conv2d(bias=torch.randn(8)),
    "conv2d stride": conv2d(stride=[2, 1], padding=[0, 2]),
    "conv2d groups that cut a pattern": conv2d(weight=torch.randn(12, 2, 3, 3), groups=2, pattern="2:4"),
    "conv2d groups, sparse": conv2d(weight=torch.randn(12, 2, 3, 3), groups=2, backend="sparse", method="rescale"),
    "conv2d same, uneven": conv2d(weight=torch.randn(8, 4, 2, 3), padding="same", dilation=[3, 1]),
    "conv2d valid": conv2d(padding="valid"),
    "conv2d unbatched": conv2d(input=torch.randn(4, 7, 6)),
    "conv2d frozen": conv2d(frozen=True, bias=torch.randn(8)),
    "conv2d frozen channels_last": conv2d(
        frozen=True, backend="sparse", input=torch.randn(2, 4, 7, 6).to(memory_format=torch.channels_last)
    ),
    "conv2d autocast": conv2d(autocast=True),
}  # fmt: skip
NOT_SETTINGS = ("op", "frozen", "autocast", "twice", "grad_output", "weight_grad_method")


def in_python(case: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: case[name].clone().requires_grad_() for name in ("input", "weight", "bias") if name in case}
    leaves["weight"].requires_grad_(not case["frozen"])
    options = {name: value for name, value in case.items() if name not in {*NOT_SETTINGS, *leaves}}
    options["weight_grad"] = case["weight_grad"], case["weight_grad_method"]
    if case["backend"] == "exact":
        options.update(pattern="1:1", backend="pruned", weight_grad=None)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"]):
        output = {"linear": sdgp.linear, "conv2d": sdgp.conv2d}[case["op"]](**leaves, **options)
    output.backward(case["grad_output"])
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def in_cpp(programs: Path, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    paths = [folder / f"{number}.pt" for number in range(len(cases))]
    for path, case in zip(paths, cases.values(), strict=True):
        torch.save({name: torch.tensor(x) if isinstance(x, list) else x for name, x in case.items()}, path)
    output(programs / "layers", *paths)
    found = [torch.load(f"{path}.result") for path in paths]  # an error, or alternating names and tensors
    readable = (x if isinstance(x, str) else dict(zip(x[::2], x[1::2], strict=True)) for x in found)
    return dict(zip(cases, readable, strict=True))


def complete(case: dict[str, Any]) -> dict[str, Any]:
    case = {"frozen": False, "autocast": False, "twice": "", "weight_grad": "1:1", "weight_grad_method": "mvue", **case}
    leaves = {name: case[name] for name in ("input", "weight")}
    options = {name: case[name] for name in ("stride", "padding", "dilation", "groups") if name in case}
    shape = {"linear": nn.functional.linear, "conv2d": nn.functional.conv2d}[case["op"]](*leaves.values(), **options)
    dtype = torch.bfloat16 if case["autocast"] else shape.dtype
    return {**case, "grad_output": torch.randn(shape.shape).to(dtype)}


@pytest.fixture(scope="module")
def results(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Any]]:
    cases = {name: complete(case) for name, case in CASES.items()}
    found = in_cpp(programs, tmp_path_factory.mktemp("cases"), cases)
    return {name: (case, found[name]) for name, case in cases.items()}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CASES)
def test_layers_are_those_of_python(name: str, results: dict[str, tuple[dict[str, Any], Any]]) -> None:
    case, found = results[name]
    assert not isinstance(found, str), found
    expected = in_python(case)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert found[key].stride() == value.stride()
        close(found[key], value)


def test_modules(programs: Path) -> None:
    assert output(programs / "layers").splitlines() == [
        "sdgp::Linear(in_features=8, out_features=16, bias=false, pattern=1:4, method=rescale, backend=pruned) ok",
        "sdgp::Conv2d(4, 8, kernel_size=[3, 3], stride=[1, 1], padding=[1, 1], padding_mode=kReflect, pattern=1:4, "
        "method=rescale, backend=pruned, weight_grad=4:16 rescale) ok",
        "reflected alike",
        "no gradients",
        "no gradients",
        "sparse output gradient",
        "changed in place",
        "refused (6, 6)",
        "refused a sparse input",
        "reset like a new layer",
    ]


# Square operands, so that a product with the wrong side or orientation keeps the right shape.
SQUARE = {"input": torch.randn(16, 16), "weight": torch.randn(16, 16), "bias": torch.randn(16), "backend": "exact"}
SQUARE_CONV = {"input": torch.randn(4, 4, 8, 8), "weight": torch.randn(4, 4, 4, 4), "backend": "exact"}
EXACT = {
    "linear": linear(**SQUARE),
    "linear without bias": {name: x for name, x in linear(**SQUARE).items() if name != "bias"},
    "linear of a batch": linear(**{**SQUARE, "input": torch.randn(16, 16, 16)}),
    "linear, weight transposed": linear(**{**SQUARE, "weight": torch.randn(16, 16).t()}),
    "linear float64": linear(**{name: x.double() if isinstance(x, Tensor) else x for name, x in SQUARE.items()}),
    "linear bfloat16": linear(**{name: x.bfloat16() if isinstance(x, Tensor) else x for name, x in SQUARE.items()}),
    "linear frozen": linear(**SQUARE, frozen=True),
    "linear autocast": linear(**SQUARE, autocast=True),
    "linear twice": linear(**SQUARE, twice="input"),
    "linear pruned to all": linear(**{**SQUARE, "backend": "pruned", "pattern": "4:4"}),
    "conv2d": conv2d(**SQUARE_CONV, bias=torch.randn(4)),
    "conv2d channels_last": conv2d(
        **{**SQUARE_CONV, "input": SQUARE_CONV["input"].to(memory_format=torch.channels_last)}
    ),
    "conv2d frozen": conv2d(**SQUARE_CONV, frozen=True),
    "conv2d frozen, one channel": conv2d(
        **{**SQUARE_CONV, "input": torch.randn(4, 1, 28, 28), "weight": torch.randn(32, 1, 5, 5)}, frozen=True
    ),
    "conv2d groups": conv2d(**{**SQUARE_CONV, "weight": torch.randn(4, 2, 4, 4)}, groups=2),
    "conv2d twice": conv2d(**SQUARE_CONV, twice="input"),
}


def in_torch(case: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: case[name].clone().requires_grad_() for name in ("input", "weight", "bias") if name in case}
    leaves["weight"].requires_grad_(not case["frozen"])
    options = {name: case[name] for name in ("stride", "padding", "dilation", "groups") if name in case}
    with torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"]):
        output = {"linear": nn.functional.linear, "conv2d": nn.functional.conv2d}[case["op"]](**leaves, **options)
    found = torch.autograd.grad(
        output, [x for x in leaves.values() if x.requires_grad], case["grad_output"], create_graph=bool(case["twice"])
    )
    gradients = dict(zip([name for name, x in leaves.items() if x.requires_grad], found, strict=True))
    if case["twice"]:
        (again,) = torch.autograd.grad(gradients["input"].sum(), leaves["weight"])
        gradients["weight"] = gradients["weight"] + again
    return {"output": output.detach(), **{name: x.detach() for name, x in gradients.items()}}


@pytest.mark.usefixtures("one_thread")
def test_exact_is_what_torch_computes(programs: Path, tmp_path: Path) -> None:
    """An exact layer must match torch bit for bit, also when differentiated twice."""
    cases = {name: complete(case) for name, case in EXACT.items()}
    for name, found in in_cpp(programs, tmp_path, cases).items():
        assert not isinstance(found, str), (name, found)
        expected = in_torch(cases[name])
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert torch.equal(found[key], value), (name, key)


def test_what_is_exact_beside_pruned_is_differentiated_twice(programs: Path, tmp_path: Path) -> None:
    cases = {make.__name__: complete(make(pattern="4:4", **PRUNED_WEIGHT_GRADIENT, twice="input"))
             for make in (linear, conv2d)}  # fmt: skip
    for name, found in in_cpp(programs, tmp_path, cases).items():
        assert not isinstance(found, str), (name, found)
        again = in_torch(cases[name])["weight"] - in_torch({**cases[name], "twice": ""})["weight"]
        close(found["weight"], in_python(cases[name])["weight"] + again)


def test_pruned_takes_the_sparse_product_on_the_cpu(programs: Path, tmp_path: Path) -> None:
    cases = {
        f"{make.__name__} {method} {backend}": complete(
            make(method=method, backend=backend, weight_grad="2:8", weight_grad_method=method)
        )
        for make in (linear, conv2d)
        for method in ("mvue", "rescale")
        for backend in ("pruned", "sparse")
    }
    for name, case in cases.items():
        case.update({key: cases[name.replace("sparse", "pruned")][key] for key in ("input", "weight", "grad_output")})
    found = in_cpp(programs, tmp_path, cases)
    for name in cases:
        for key in ("input", "weight"):
            assert torch.equal(found[name][key], found[name.replace("sparse", "pruned")][key]), (name, key)


ERRORS = {
    "pattern": (linear(pattern="2-4"), 'linear: expected pattern "n:m", got "2-4"'),
    "pattern's end": (linear(pattern="2:4x"), 'linear: expected pattern "n:m", got "2:4x"'),
    "n > m": (linear(pattern="5:4"), r"linear: expected 1 <= n <= m <= 64, got n=5, m=4 \(pattern\)"),
    "method": (linear(method="topk"), r'linear: expected method to be one of .*, got "topk" \(pattern\)'),
    "backend": (
        linear(backend="auto"),
        'linear: expected backend to be one of pruned, sparse, dense, exact, got "auto"',
    ),
    "weight_grad": (linear(weight_grad="none"), 'linear: expected weight_grad "n:m", got "none"'),
    "weight_grad's m": (
        conv2d(weight_grad="4:65"),
        r"conv2d: expected 1 <= n <= m <= 64, got n=4, m=65 \(weight_grad\)",
    ),
    "weight_grad_method": (
        linear(weight_grad_method="topk"),
        r'linear: expected method to be one of .*, got "topk" \(weight_grad\)',
    ),
    "complex": (
        linear(**{name: torch.randn(16, 16, dtype=torch.complex64) for name in ("input", "weight")}),
        "linear: expected strided tensors of real numbers, got CPUComplexFloatType",
    ),
    **{
        f"{make.__name__}'s {gradient} gradient twice": (
            make(**settings, twice=gradient),
            f"{make.__name__}: expected one differentiation, got a second",
        )
        for make in (linear, conv2d)
        for gradient, settings in {"input": {}, "weight": {"pattern": "4:4", **PRUNED_WEIGHT_GRADIENT}}.items()
    },
}


def test_errors(programs: Path, tmp_path: Path) -> None:
    found = in_cpp(programs, tmp_path, {name: complete(case) for name, (case, _) in ERRORS.items()})
    for name, (_, message) in ERRORS.items():
        assert re.match(message, found[name]), found[name]


def test_cmake_asks_for_torch(tmp_path: Path) -> None:
    lists = "cmake_minimum_required(VERSION 3.24)\nproject(alone NONE)\n{}\nfind_package(sdgp CONFIG REQUIRED)\n"
    for preamble, message in {
        "": "sdgp needs LibTorch >= 2.10, found none: call find_package(Torch REQUIRED) before find_package(sdgp)",
        "set(Torch_FOUND TRUE)\nset(Torch_VERSION 2.9.1)": "sdgp needs LibTorch >= 2.10, found 2.9.1",
    }.items():
        (tmp_path / "CMakeLists.txt").write_text(lists.format(preamble))
        command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={sdgp.cmake_prefix_path}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode != 0
        assert message in " ".join(result.stderr.split())
