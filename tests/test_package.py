# SPDX-License-Identifier: BSD-3-Clause
"""Tests the installed package: the libraries it links, what CMake finds, and that every fact is stated once."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import struct
import subprocess
import sysconfig
import zlib
from pathlib import Path

import pytest
import torch

import sdgp

LIBRARY = Path(sdgp.cmake_prefix_path) / "lib" / "libsdgp.so"
CUDA_LIBRARY = LIBRARY.with_name("libsdgp_cuda.so")
needs_cuda_library = pytest.mark.skipif(
    not CUDA_LIBRARY.exists() and not shutil.which("nvcc"), reason="built where there was no nvcc"
)

# A library on LibTorch's stable ABI may use only the C shims.
STABLE = re.compile(r"^(aoti_torch_|torch_)[a-zA-Z0-9_]+$")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def defined_by(library: Path) -> set[str]:
    lines = output("nm", "-D", "--defined-only", str(library)).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


def needed_of_torch(library: Path) -> set[str]:
    undefined = {line.split()[-1] for line in output("nm", "-D", "--undefined-only", str(library)).splitlines()}
    # A symbol with a version comes from glibc, libstdc++ or libgcc. The other two prefixes are weak symbols.
    return {name for name in undefined if "@" not in name and not name.startswith(("_ITM_", "__gmon_start__"))}


@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
@pytest.mark.parametrize("library", [LIBRARY, pytest.param(CUDA_LIBRARY, marks=needs_cuda_library)])
def test_no_symbol_outside_the_stable_abi(library: Path) -> None:
    needed = needed_of_torch(library)
    assert needed, "expected the library to use torch"
    assert {name for name in needed if not STABLE.match(name)} == set()
    # The running torch must define each shim. One shim exists only in a torch with CUDA.
    shims = defined_by(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    of_cuda = {"aoti_torch_get_current_cuda_stream"} if library == CUDA_LIBRARY else set()
    assert needed - shims == of_cuda
    if of_cuda and torch.version.cuda:
        assert of_cuda <= defined_by(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so")


def architectures(library: Path) -> set[tuple[str, int]]:
    """Reads ("elf" or "ptx", compute capability x 10) of all device code from the headers of the fatbinaries."""
    data, at = library.read_bytes(), 0
    found = set()
    while (at := data.find(struct.pack("<IHH", 0xBA55ED50, 1, 16), at)) >= 0:
        (size,) = struct.unpack_from("<Q", data, at + 8)
        entry = at + 16
        while entry < at + 16 + size:
            kind, _, header, payload = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            found.add(({1: "ptx", 2: "elf"}[kind], architecture))
            entry += header + payload
        at = entry
    return found


@needs_cuda_library
def test_device_code_for_every_architecture() -> None:
    compiled = {("elf", architecture) for architecture in (80, 90, 100, 120)}
    assert architectures(CUDA_LIBRARY) == compiled | {("ptx", 120)}


@needs_cuda_library
def test_cuda_ops_are_there_where_torch_has_cuda() -> None:
    for op in ("prune_nm", "_prune_nm_scale", "_pack_24"):
        found = torch._C._dispatch_has_kernel_for_dispatch_key(f"sdgp::{op}", "CUDA")
        assert found == (torch.version.cuda is not None)
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", str(CUDA_LIBRARY)))
    assert {name for name in needed if "cu" in name} == {"libtorch_cuda.so"}  # the CUDA runtime is linked statically


@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
@pytest.mark.parametrize(
    ("library", "functions"),
    [
        (LIBRARY, {"sdgp_isa", "sdgp_version"}),
        pytest.param(CUDA_LIBRARY, {"sdgp_cuda_driver", "sdgp_cuda_runtime"}, marks=needs_cuda_library),
    ],
)
def test_exports_nothing_but_its_c_functions(library: Path, functions: set[str]) -> None:
    linker = {"__bss_start", "_edata", "_end"}
    own = {name for name in defined_by(library) if not name.startswith("_Z")} - linker
    assert own == functions
    assert not any("sdgp" in name for name in defined_by(library) - own)


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")
def test_records_no_path_of_the_machine_that_built_it() -> None:
    for library in (*LIBRARY.parent.glob("*.so"), *Path(sdgp.cmake_prefix_path).glob("_C*.so")):
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


ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_what_it_should_and_nothing_else() -> None:
    """The installed files must be those of the wheel. Files that pip adds, such as the command `sdgp`, are left out."""
    files = importlib.metadata.files("sdgp")
    assert files is not None
    if any(file.suffix == ".pth" for file in files):
        pytest.skip("an editable installation is no wheel")
    by_pip = {"INSTALLER", "REQUESTED", "direct_url.json"}
    scripts = {file for file in files if file.parts[-2:] == ("bin", "sdgp")}
    assert len(scripts) == 1
    held = {file for file in files if file.name not in by_pip and "__pycache__" not in file.parts} - scripts
    python = {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python").rglob("*.py*")}
    headers = {f"sdgp/include/sdgp/{path.name.removesuffix('.in')}" for path in (ROOT / "cpp/include/sdgp").iterdir()}
    cmake = {
        f"sdgp/lib/cmake/sdgp/sdgp{name}.cmake" for name in ("Config", "ConfigVersion", "Targets", "Targets-release")
    }
    libraries = {"sdgp/lib/libsdgp.so", f"sdgp/_C{sysconfig.get_config_var('EXT_SUFFIX')}"}
    libraries |= {"sdgp/lib/libsdgp_cuda.so"} if CUDA_LIBRARY.exists() else set()
    metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    info = {f"sdgp-{sdgp.__version__}.dist-info/{name}" for name in metadata}
    sources = {name for name in python | {"sdgp/py.typed"} if "__pycache__" not in name}
    assert {str(file) for file in held} == sources | headers | cmake | libraries | info
    packed = sum(len(zlib.compress(Path(str(file.locate())).read_bytes())) for file in held)
    assert packed < 10 * 2**20


def test_needs_torch_alone() -> None:
    required = [line for line in importlib.metadata.requires("sdgp") or [] if "extra ==" not in line]
    assert required == ["torch>=2.10"]
    extras = importlib.metadata.metadata("sdgp").get_all("Provides-Extra")
    assert sorted(extras or []) == ["ffcv", "plot", "recipes"]


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")
def test_is_stripped_and_brings_no_library_of_others() -> None:
    if not any(
        "manylinux" in line for line in (importlib.metadata.distribution("sdgp").read_text("WHEEL") or "").split()
    ):
        pytest.skip("not a repaired wheel: make wheel")
    for library in (LIBRARY, *Path(sdgp.cmake_prefix_path).glob("_C*.so")):
        assert ".symtab" not in output("readelf", "--wide", "--section-headers", str(library))
    assert {path.name for path in LIBRARY.parent.glob("*.so*")} <= {LIBRARY.name, CUDA_LIBRARY.name}


CONSUMER = """
cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES CXX)
set(TORCH_LIBRARIES torch_cpu) # in place of find_package(Torch)
find_package(sdgp {version} CONFIG REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE sdgp::sdgp)
# Where sdgp's own needs are found.
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
