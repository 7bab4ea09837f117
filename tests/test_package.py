# SPDX-License-Identifier: BSD-3-Clause
"""The installed package: what the library links to, what CMake finds, that every fact is said once."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sdgp

LIBRARY = Path(sdgp.cmake_prefix_path) / "lib" / "libsdgp.so"

# All that a library on LibTorch's stable ABI may ask of it: the C shims.
STABLE = re.compile(r"^(aoti_torch_|torch_)[a-zA-Z0-9_]+$")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def defined_by(library: Path) -> set[str]:
    lines = output("nm", "-D", "--defined-only", str(library)).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
def test_no_symbol_outside_the_stable_abi() -> None:
    undefined = {line.split()[-1] for line in output("nm", "-D", "--undefined-only", str(LIBRARY)).splitlines()}
    # A symbol with a version comes from glibc, libstdc++ or libgcc; `w` is weak (ITM, gmon).
    unversioned = {name for name in undefined if "@" not in name and not name.startswith(("_ITM_", "__gmon_start__"))}
    assert unversioned, "expected the library to use torch"
    assert {name for name in unversioned if not STABLE.match(name)} == set()
    # And each of them is there in the torch that runs.
    shims = defined_by(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    assert unversioned - shims == set()


@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
def test_exports_nothing_but_its_c_functions() -> None:
    linker = {"__bss_start", "_edata", "_end"}
    own = {name for name in defined_by(LIBRARY) if not name.startswith("_Z")} - linker
    assert own == {"sdgp_isa", "sdgp_version"}
    assert not any("sdgp" in name for name in defined_by(LIBRARY) - own)


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")
def test_records_no_path_of_the_machine_that_built_it() -> None:
    for library in (LIBRARY, *Path(sdgp.cmake_prefix_path).glob("_C*.so")):
        dynamic = output("readelf", "-d", str(library))
        for line in dynamic.splitlines():
            if "RPATH" in line or "RUNPATH" in line:
                assert line.endswith("[$ORIGIN/lib]")
        assert "libpython" not in dynamic
        assert b"/site-packages/" not in library.read_bytes()


def test_one_version() -> None:
    assert sdgp.__version__ == importlib.metadata.version("sdgp")
    header = (Path(sdgp.cmake_prefix_path) / "include" / "sdgp" / "build_info.h").read_text()
    assert f'#define SDGP_VERSION "{sdgp.__version__}"' in header


CONSUMER = """
cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES CXX)
find_package(sdgp {version} CONFIG REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE sdgp::sdgp)
# In place of find_package(Torch): where sdgp's own needs are found.
target_link_directories(consumer PRIVATE "{torch}")
target_link_options(consumer PRIVATE "LINKER:-rpath-link,{torch}" "LINKER:-rpath,{torch}" "LINKER:--disable-new-dtags")
"""

MAIN = """
#include <sdgp/build_info.h>
#include <cstdio>
#include <cstring>
int main() {
  std::printf("%s %s\\n", sdgp_version(), sdgp_isa());
  return std::strcmp(sdgp_version(), SDGP_VERSION) != 0;
}
"""


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="needs cmake and a C++ compiler")
def test_cmake_finds_the_installed_package(tmp_path: Path) -> None:
    torch_lib = Path(torch.__file__).parent / "lib"
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER.format(version=sdgp.__version__, torch=torch_lib))
    (tmp_path / "main.cpp").write_text(MAIN)
    build = tmp_path / "build"
    output("cmake", "-S", str(tmp_path), "-B", str(build), f"-DCMAKE_PREFIX_PATH={sdgp.cmake_prefix_path}")
    output("cmake", "--build", str(build))
    assert output(str(build / "consumer")).split() == [sdgp.__version__, sdgp._load.C.isa()]


class _Scripted(torch.nn.Module):
    def __init__(self, input: Tensor) -> None:
        super().__init__()
        self.register_buffer("input", input)
        self.register_buffer("expected", sdgp.prune_nm(input, 2, 4, 1, "rescale"))

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.sdgp.prune_nm(input, 2, 4, 1, "rescale")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="needs cmake and a C++ compiler")
def test_torchscript_in_a_program_without_python(tmp_path: Path) -> None:
    torch.jit.script(_Scripted(torch.randn(2, 8, 3, 3))).save(tmp_path / "model.pt")
    paths = f"-DCMAKE_PREFIX_PATH={sdgp.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    root = f"-DTORCH_ROOT={Path(torch.__file__).parent if torch.version.cuda else ''}"
    output("cmake", "-S", str(Path(__file__).parent / "consumer"), "-B", str(tmp_path), paths, root)
    output("cmake", "--build", str(tmp_path))
    program = str(tmp_path / "consumer")
    assert output(program, str(tmp_path / "model.pt")).split() == [sdgp.__version__]
    assert not re.search(r"lib(torch_)?python", output("ldd", program))
