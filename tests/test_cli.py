# SPDX-License-Identifier: BSD-3-Clause
"""Tests the command line: the output of each command, its exit status, and the errors of a broken installation."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command, report
from torch import Tensor

import sdgp
import sdgp_cli
from sdgp import _autograd, _ops, _semi_structured
from sdgp_cli import doctor, selftest

SCRIPT = "import sys\nfrom sdgp_cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"  # as pip writes it


def spawn(*command: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(path)] if path else []
    environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


# The entry point, help, and bad usage.


def test_entry_point() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="sdgp")
    assert script.load() is sdgp_cli.main


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"sdgp {sdgp.__version__}\n", "")


@pytest.mark.parametrize("name", ["", "doctor", "bench", "profile"])
def test_help(name: str, command: Command) -> None:
    status, out, err = command(*name.split(), "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: sdgp {name}".rstrip())
    assert ("examples:" in out) == (name in ("", "profile"))
    assert ("[--json]" in out) == (name != "")


def test_examples_parse() -> None:
    lines = [
        line
        for text in (sdgp_cli._EXAMPLES, sdgp_cli._MODELS)
        for line in text.splitlines()
        if line.startswith("  sdgp ")
    ]
    assert len(lines) > 5
    for line in lines:
        sdgp_cli._parser().parse_args(re.split(r"\s{2,}", line.strip())[0].split()[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "sdgp: the following arguments are required: COMMAND"),
        ("profile", "sdgp profile: the following arguments are required: MODEL"),
        ("profile x --batch 0", "sdgp profile: argument --batch: expected a number from 1 on, got '0'"),
        ("profile x --threads no", "sdgp profile: argument --threads: expected a number from 1 on, got 'no'"),
        (
            "profile x --input 8x0x3",
            "sdgp profile: argument --input: expected sizes from 1 on, such as 8x3x224x224, got '8x0x3'",
        ),
        ("profile x --image 8 --tokens 8", "sdgp profile: argument --tokens: not allowed with argument --image"),
        ("doctor --device cpu", "sdgp: unrecognized arguments: --device cpu"),
        ("bench --device frob", "sdgp bench: expected a device that works here, such as (cpu|cuda), got 'frob': .+"),
        ("profile x --device meta", "sdgp profile: expected a device that works here, .* got 'meta': .+"),
        ("profile x --dtype int8", "sdgp profile: expected --dtype to be one of float32, .*, bfloat16, got 'int8'"),
        (
            "bench --out report.txt",
            "sdgp bench: expected --out to be a folder or a .pdf, .png, .svg file, got 'report.txt'",
        ),
        ("bench --out /dev/null/x", "sdgp bench: expected --out to be in a folder that can be made, got .*"),
    ],
)
def test_bad_usage(arguments: str, message: str, command: Command) -> None:
    status, out, err = command(*arguments.split())
    assert (status, out) == (2, "")
    assert re.fullmatch(message, err.splitlines()[0])
    assert len(err.splitlines()) <= 2


def test_ctrl_c(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert command("doctor") == (130, "", "\n")


def test_ctrl_c_of_a_process() -> None:
    def listen() -> None:  # processes started in the background ignore the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "sdgp", "bench", "--threads", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("[1/")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_a_reader_that_leaves() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "sdgp", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_json_has_no_nan() -> None:
    text = sdgp_cli.to_json({"a": float("nan"), "b": [1.0, {"c": float("inf")}], "d": (2,)})
    assert json.loads(text) == {"a": None, "b": [1.0, {"c": None}], "d": [2]}


# sdgp doctor

OPS = {"prune_nm", "compress_nm", "decompress_nm", "spmm_nm"}


def test_doctor(command: Command) -> None:
    found = report(command, "doctor")
    assert found["ok"] is True
    assert found["error"] is None
    assert found["versions"]["sdgp"] == sdgp.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["torch_cuda"] == torch.version.cuda
    libraries = {Path(row["file"]).name.split(".")[0]: row for row in found["libraries"]}
    assert list(libraries) == ["_C", "libsdgp", "libsdgp_cuda"]
    assert libraries["_C"]["state"] == libraries["libsdgp"]["state"] == "loaded"
    assert (libraries["libsdgp_cuda"]["state"] == "loaded") == (
        torch.version.cuda is not None and Path(libraries["libsdgp_cuda"]["file"]).exists()
    )
    assert Path(libraries["libsdgp"]["file"]).is_relative_to(sdgp.cmake_prefix_path)
    assert found["cpu"]["kernels"] == sdgp._load.C.isa()
    assert (found["cpu"]["kernels"] == "avx512") <= ("avx512f" in found["cpu"]["instructions"])
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert (found["no_gpu"] is None) == torch.cuda.is_available() == (len(found["gpus"]) > 0)
    on_cpu = {row["op"]: row for row in found["tests"] if row["device"] == "cpu"}
    layers = {f"{op}, {backend}" for op in ("linear", "conv2d") for backend in ("auto", "pruned", "sparse", "dense")}
    assert set(on_cpu) == OPS | layers
    for row in on_cpu.values():
        assert row["state"] == "ok"
        assert re.fullmatch(r"[1-9]\d* comparisons", row["note"])


def test_doctor_in_text(command: Command) -> None:
    status, out, err = command("doctor")
    assert (status, err) == (0, "")
    assert out.splitlines()[0].startswith(f"sdgp            {sdgp.__version__}, ")
    assert "/libsdgp.so: loaded\n" in out
    assert out.endswith("\n\nAll self-tests passed.\n")


@pytest.mark.parametrize("wrong", [lambda x: x + 1, lambda x: x * torch.nan, lambda x: x.double(), lambda x: x / 0])
def test_doctor_finds_what_is_wrong(wrong: Any, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    spmm_nm = _ops.spmm_nm
    monkeypatch.setattr(_ops, "spmm_nm", lambda *arguments: wrong(spmm_nm(*arguments)))
    status, out, _ = command("doctor")
    assert status == 1
    assert re.search(
        r"spmm_nm +cpu +failed: AssertionError: 2:4, torch.float32: expected .*, got .* \(after 0 comp", out
    )
    assert "prune_nm        cpu     ok" in out
    assert out.endswith(f"1 of {len(selftest.run())} self-tests failed\n")


def test_doctor_finds_an_op_that_raises(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(_ops, "prune_nm", fail)
    status, out, _ = command("doctor", "--json")
    assert status == 1
    failed = [row for row in json.loads(out)["tests"] if row["state"] == "failed"]
    assert [row["op"] for row in failed][:1] == ["prune_nm"]
    assert failed[0]["note"] == "RuntimeError: no kernel image (after 0 comparisons)"


@pytest.mark.parametrize("backend", ["auto", "pruned", "sparse", "dense"])
def test_selftest_sees_an_exact_gradient_where_it_should_be_pruned(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = torch.nn.functional.linear
    monkeypatch.setattr(_autograd, "linear", lambda x, weight, **_: exact(x, weight))
    result = selftest._result("linear", torch.device("cpu"), selftest._TESTS[f"linear, {backend}"])
    assert result["state"] == ("ok" if backend == "auto" else "failed")
    assert backend == "auto" or "data gradient, 2:4" in result["note"]


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_doctor_tells_what_a_gpu_can_run(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "GPU", 80 * 2**30
        major, minor = capability

    missing = None if capability >= (8, 0) else "a GPU of compute capability 8.0 or newer, got 7.5"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(_semi_structured, "_obstacle_of_device", lambda index: missing)
    (row,) = doctor._gpus()
    assert row["sparse_products"]["float16"] == row["sparse_products"]["bfloat16"] == missing
    assert row["sparse_products"]["float32"].startswith("float16 or bfloat16 on cuda")
    text = doctor._show_gpu(row)
    usable = "no dtype; float16 needs a GPU of" if missing else "float16, bfloat16; float32 needs"
    assert text.startswith(
        f"GPU, compute capability {capability[0]}.{capability[1]}, 80.0 GiB; 2:4 sparse products in {usable}"
    )


def test_a_device_without_a_kernel_is_skipped() -> None:
    result = selftest._result("spmm_nm", torch.device("cuda"), selftest._TESTS["spmm_nm"])
    assert (result["state"], result["note"]) == ("skipped", "needs a kernel for cuda, got none")


def test_doctor_of_a_process_with_another_instruction_set() -> None:
    result = spawn("-X", "dev", "-m", "sdgp", "doctor", "--json", SDGP_FORCE_ISA="baseline")
    assert result.returncode == 0
    assert json.loads(result.stdout)["cpu"].items() >= {"kernels": "baseline", "forced": True}.items()


# A broken installation.


def without_libraries(folder: Path) -> None:
    if any("editable" in type(finder).__module__ for finder in sys.meta_path):
        pytest.skip("an editable installation is found before any other")
    shutil.copytree(Path(sdgp.__file__).parent, folder / "sdgp", ignore=shutil.ignore_patterns("_C.*", "lib"))


def of_another_python(folder: Path) -> None:
    without_libraries(folder)
    (folder / "sdgp" / "_C.cpython-39-aarch64-linux-gnu.so").touch()


def of_another_version(folder: Path) -> None:
    (folder / "sdgp-9.9.9.dist-info").mkdir()
    (folder / "sdgp-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sdgp\nVersion: 9.9.9\n")


def under_an_old_torch(folder: Path) -> None:
    (folder / "torch.py").write_text("__version__ = '2.9.1'")


def without_torch(folder: Path) -> None:
    (folder / "torch.py").write_text("raise ImportError('gone')")


def under_a_broken_torch(folder: Path) -> None:
    (folder / "torch.py").write_text("raise OSError('libcublas.so.13: no such file')")


BROKEN = {
    without_libraries: "sdgp's compiled library did not load under torch ",
    of_another_python: r"sdgp was built for another Python or platform: this one loads _C\..*, found _C\.cpython-39",
    of_another_version: r"sdgp is installed as 9\.9\.9, found a compiled library of ",
    under_an_old_torch: r"sdgp needs torch >= 2\.10, found 2\.9\.1",
    without_torch: r"sdgp needs torch >= 2\.10, found none that imports",
    under_a_broken_torch: "libcublas.so.13: no such file",
}


@pytest.mark.parametrize(("make_broken", "message"), BROKEN.items(), ids=[make.__name__ for make in BROKEN])
def test_broken(make_broken: Any, message: str, tmp_path: Path) -> None:
    make_broken(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sdgp").write_text(SCRIPT)

    result = spawn(str(tmp_path / "bin" / "sdgp"), "doctor", "--json", path=tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert re.match(message, found["error"])

    for command in ("bench", "profile resnet18"):
        result = spawn(str(tmp_path / "bin" / "sdgp"), *command.split(), path=tmp_path)
        assert (result.returncode, result.stdout) == (1, "")
        assert re.fullmatch(rf"sdgp {command.split()[0]}: {message}.* \(sdgp doctor tells more\)\n", result.stderr)


def test_a_broken_installation_of_another_python_names_both_sides(tmp_path: Path) -> None:
    of_another_python(tmp_path)
    found = json.loads(spawn("-c", SCRIPT, "doctor", "--json", path=tmp_path).stdout)
    missing = "missing; for another Python or platform there is _C.cpython-39-aarch64-linux-gnu.so"
    assert [row["state"] for row in found["libraries"][:2]] == [missing, "missing"]
    assert Path(found["libraries"][0]["file"]).is_relative_to(tmp_path)


def test_doctor_of_a_broken_installation_in_text(tmp_path: Path) -> None:
    under_an_old_torch(tmp_path)
    result = spawn("-c", SCRIPT, "doctor", path=tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    assert re.search(f"\nimport sdgp fails: {BROKEN[under_an_old_torch]}", result.stdout)
    assert "libsdgp.so: " in result.stdout


def test_help_and_version_of_a_broken_installation(tmp_path: Path) -> None:
    without_torch(tmp_path)
    assert spawn("-c", SCRIPT, "--version", path=tmp_path).stdout == f"sdgp {sdgp.__version__}\n"
    assert spawn("-c", SCRIPT, "profile", "--help", path=tmp_path).returncode == 0


def test_ctrl_c_while_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    result = spawn("-c", SCRIPT, "doctor", path=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "\n")


def test_other_programs_get_the_import_error(tmp_path: Path) -> None:
    without_torch(tmp_path)
    (tmp_path / "sdgp").write_text("import sdgp")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import sdgp")
    for command in (("-c", "import sdgp"), (str(tmp_path / "sdgp"),), ("-m", "package", "sdgp"), ("-m", "sdgp")):
        result = spawn(*command, path=tmp_path)
        assert result.returncode == 1
        assert "Traceback" in result.stderr
        assert "ImportError: sdgp needs torch >= 2.10" in result.stderr
