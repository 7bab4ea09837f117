# SPDX-License-Identifier: BSD-3-Clause
"""Tests the source tree: what it builds against, and that it compiles for another CPU than this one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LISTS = """
cmake_minimum_required(VERSION 3.24)
project(old NONE)
find_package(TorchStable 2.10 REQUIRED)
"""

VERSION = """
#define TORCH_VERSION_MAJOR 2
#define TORCH_VERSION_MINOR 9
#define TORCH_VERSION_PATCH 1
"""


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_cmake_refuses_an_older_torch(tmp_path: Path) -> None:
    header, version = "include/torch/csrc/stable/library.h", "include/torch/headeronly/version.h"
    files = {"CMakeLists.txt": LISTS, header: "", version: VERSION, "lib/libtorch_cpu.so": "", "lib/libc10.so": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    options = (f"-DCMAKE_MODULE_PATH={ROOT / 'cmake'}", f"-DTorchStable_ROOT={tmp_path}")
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert 'Found unsuitable version "2.9.1", but required is at least "2.10"' in message
    assert "sdgp builds against torch >= 2.10: pip install --upgrade 'torch>=2.10'" in message


def aarch64_compiler(scratch: Path) -> list[str] | None:
    """Returns a compiler that also finds aarch64's standard library."""
    (scratch / "probe.cpp").write_text("#include <string>")
    for command in (["aarch64-linux-gnu-g++"], ["clang++", "--target=aarch64-linux-gnu"]):
        probe = [*command, "-fsyntax-only", str(scratch / "probe.cpp")]
        if shutil.which(command[0]) and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return command
    return None


@pytest.mark.parametrize("source", ["isa_baseline.cpp", "select.cpp"])
def test_compiles_for_aarch64(source: str, tmp_path: Path) -> None:
    compiler = aarch64_compiler(tmp_path)
    if compiler is None:
        pytest.skip("needs a compiler for aarch64: aarch64-linux-gnu-g++, or clang++ and that architecture's headers")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=off", "-c", "-o", "/dev/null"]
    command = [*compiler, *flags, str(ROOT / "cpp" / "kernels" / source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
