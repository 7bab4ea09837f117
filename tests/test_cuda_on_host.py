# SPDX-License-Identifier: BSD-3-Clause
"""Tests the CUDA kernels and their launches on the host, against the CPU's ops and PyTorch's metadata.

These tests need a C++ compiler and no GPU. The tests that need a GPU are in test_cuda.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from compare import same, same_as_reference, strided_tensors
from hypothesis import given
from hypothesis import strategies as st
from samples import DTYPES, FIXED_METHODS, PATTERNS, Sample, cast, draw_seed, each_sample
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import sdgp
from sdgp._load import C
from sdgp._ops import PRUNED_DTYPES

ROOT = Path(__file__).parents[1]
DTYPES_BY_KERNEL = PRUNED_DTYPES  # in the order of DType
METHODS_BY_KERNEL, LAYOUTS = C.methods, C.layouts_24  # in the order of Method and Layout24
TILE_ROWS, TILE_COLS = C.tile_24


def build(source: str, output: Path, *flags: str) -> Path:
    """Compiles a program of tests/cpp with the stand-in for CUDA's runtime, and with the flags in SDGP_SANITIZE."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = ROOT / "tests" / "cpp"
    common = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
    flags += (*os.environ.get("SDGP_SANITIZE", "").split(),)
    command = [compiler, *common, *flags, f"-I{folder / 'cuda_stand_in'}", "-o", output, folder / source, "-ldl"]
    subprocess.run(command, check=True)
    return output


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda") / "cuda_on_host.so"
    return ctypes.CDLL(str(build("cuda_on_host.cpp", path, "-shared", "-fPIC")))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("cuda_stand_in_test.cpp", tmp_path_factory.mktemp("cuda") / "stand_in")


@pytest.mark.parametrize("case", ["barrier", "no_barrier", "shuffle", "limits"])
def test_the_stand_in_runs_threads_as_a_gpu_does(stand_in: Path, case: str) -> None:
    subprocess.run([stand_in, case], check=True)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("half_at_the_barrier", "a barrier that not all threads of the block reach"),
        ("a_lane_has_left", "a shuffle that not all lanes of the warp reach"),
        ("half_a_warp", "a shuffle of a part of a warp"),
    ],
)
def test_the_stand_in_ends_what_a_gpu_would_hang_on(stand_in: Path, case: str, message: str) -> None:
    result = subprocess.run([stand_in, case], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGABRT
    assert message in result.stderr


def _array(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * max(1, len(values)))(*values)


def memory_of(x: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]:
    """Returns a tensor's data pointer, and the address and size of its storage."""
    storage = x.untyped_storage()
    return ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes())


def prune(
    kernels: ctypes.CDLL, x: Tensor, n: int, m: int, dim: int, method: str, seed: Tensor, scale: bool = False
) -> tuple[Tensor, int]:
    """Runs prune_nm. Also returns its path: share of a thread * 4 + vectors read * 2 + vectors written."""
    output = torch.empty_like(x).fill_(7)
    dim %= x.ndim
    others = [d for d in range(x.ndim) if d != dim]
    sample = 1 if dim == 0 else 0
    row_step = {d: int(torch.tensor([x.shape[e] for e in others if e > d]).prod()) for d in others}
    others = sorted((d for d in others if x.shape[d] != 1), key=lambda d: -output.stride(d))
    path: int = kernels.prune_on_host(
        *memory_of(x),
        ctypes.c_void_p(output.data_ptr()),
        ctypes.c_int64(output.untyped_storage().nbytes()),
        DTYPES_BY_KERNEL.index(x.dtype),
        METHODS_BY_KERNEL.index(method),
        int(scale),
        n,
        m,
        ctypes.c_int64(seed.item()),
        *(ctypes.c_int64(size) for size in (x.shape[dim], x.stride(dim), output.stride(dim))),
        int(x.ndim > 2),
        len(others),
        _array([x.shape[d] for d in others]),
        _array([x.stride(d) for d in others]),
        _array([output.stride(d) for d in others]),
        _array([row_step[d] for d in others]),
        _array([d == sample for d in others]),
    )
    return output, path


@each_sample()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_prunes_as_the_cpu_does(kernels: ctypes.CDLL, sample: Sample, dtype: torch.dtype, method: str) -> None:
    x = cast(sample.make(), dtype)
    if x.numel() == 0:
        pytest.skip("the op launches nothing")
    for n, m in PATTERNS:
        if n == m:
            continue
        seed = draw_seed()
        for scale in (False, True):
            op = torch.ops.sdgp._prune_nm_scale if scale else torch.ops.sdgp.prune_nm
            actual, _ = prune(kernels, x, n, m, sample.dim, method, seed, scale)
            expected = op(x, n, m, sample.dim, method, seed)
            assert actual.stride() == expected.stride()
            same_as_reference(actual, expected, method)


@given(x=strided_tensors(), data=st.data())
def test_any_shape_and_strides(kernels: ctypes.CDLL, x: Tensor, data: st.DataObject) -> None:
    x = x.to(data.draw(st.sampled_from(DTYPES)))
    dim = data.draw(st.integers(0, x.ndim - 1))
    m = data.draw(st.integers(2, 64))
    n = data.draw(st.integers(1, m - 1))
    method = data.draw(st.sampled_from(FIXED_METHODS))
    seed = draw_seed()
    expected = torch.ops.sdgp.prune_nm(x, n, m, dim, method, seed)
    same_as_reference(prune(kernels, x, n, m, dim, method, seed)[0], expected, method)


def test_every_path_is_taken(kernels: ctypes.CDLL) -> None:
    def path(x: Tensor, m: int, dim: int) -> int:
        return prune(kernels, x, 1, m, dim, "magnitude", draw_seed())[1]

    group, two_rows, span, vectors = 0, 4, 8, 3
    assert path(torch.randn(8, 64), 4, 1) == group + vectors
    assert path(torch.randn(8, 64, 6, 6), 4, 1) == group  # one row of 4-byte values fills a warp's access
    assert path(torch.randn(8, 63), 3, 1) == group
    assert path(torch.randn(513)[1:], 4, 0) == group + 1  # reads begin unaligned
    images = torch.randn(8, 64, 6, 6).bfloat16()
    assert path(images, 4, 1) == two_rows
    assert path(images, 16, 1) == two_rows
    assert path(images, 32, 1) == group
    assert path(torch.randn(8, 64, 5, 5).bfloat16(), 4, 1) == group  # an odd number of rows
    for m in (4, 8):
        assert path(images.contiguous(memory_format=torch.channels_last), m, 1) == span + vectors
        assert path(torch.randn(4, 5, 24).half(), m, 2) == span + vectors  # all rows are one
        assert path(torch.randn(3, 5, 24).half(), m, 2) == group + vectors  # 22.5 spans
        assert path(torch.randn(4, 80).half()[:, :72], m, 1) == group + vectors  # rows of 4.5 spans
        assert path(torch.randn(4, 80).half()[:, :64], m, 1) == span + vectors
        assert path(torch.randn(4, 84).half()[:, :64], m, 1) == group + (vectors if m == 4 else 1)
    assert path(images.contiguous(memory_format=torch.channels_last), 16, 1) == group + vectors


@pytest.mark.parametrize("method", FIXED_METHODS)
@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 4), (1, 8), (4, 8), (7, 8)])
def test_spans_and_pairs(kernels: ctypes.CDLL, pattern: tuple[int, int], method: str) -> None:
    """Threads that take several groups must give what the CPU gives, with ties, signed zeros, inf and NaN."""
    for shape, dim in (((6, 96), 1), ((2, 64, 4, 6), 1), ((2, 9, 4, 6), 1)):
        for memory_format in (torch.contiguous_format, torch.channels_last)[: len(shape) - 2 or 1]:
            x = torch.randn(shape)
            x[torch.rand_like(x) < 0.3] = 1.0
            x[torch.rand_like(x) < 0.2] = -1.0
            x[torch.rand_like(x) < 0.2] = -0.0
            x[torch.rand_like(x) < 0.1] = 0.0
            for special in (0.0, torch.inf, torch.nan):
                x.view(-1)[::97] = special
                for dtype in (torch.float16, torch.bfloat16):
                    given, seed = x.to(dtype).contiguous(memory_format=memory_format), draw_seed()
                    for scale in (False, True):
                        op = torch.ops.sdgp._prune_nm_scale if scale else torch.ops.sdgp.prune_nm
                        actual, _ = prune(kernels, given, *pattern, dim, method, seed, scale)
                        same_as_reference(actual, op(given, *pattern, dim, method, seed), method)


@pytest.mark.parametrize("method", FIXED_METHODS)
@pytest.mark.parametrize("m", [15, 16, 17, 32, 33, 64])
def test_neighboring_rows_of_every_group_size(kernels: ctypes.CDLL, m: int, method: str) -> None:
    """No row may be left out. Two rows of 16-bit floats share a thread, but only up to a group size of 16."""
    for x, dim in ((torch.randn(2, 70, 4, 6), 1), (torch.randn(130, 8), 0)):
        seed = draw_seed()
        for dtype in (torch.float16, torch.bfloat16):
            actual, path = prune(kernels, x.to(dtype), 3, m, dim, method, seed)
            same_as_reference(actual, torch.ops.sdgp.prune_nm(x.to(dtype), 3, m, dim, method, seed), method)
            assert path == (4 if m <= 16 else 0)


def test_long_sums_of_rescale(kernels: ctypes.CDLL) -> None:
    for shape, dim in (((2, 1300, 40), -1), ((2, 8, 40, 41), 1), ((3, 5000), -1), ((1, 8, 1100), 1)):
        x, seed = torch.randn(shape), draw_seed()
        expected = torch.ops.sdgp.prune_nm(x, 2, 4, dim, "rescale", None)
        same_as_reference(prune(kernels, x, 2, 4, dim, "rescale", seed)[0], expected, "rescale")


def pack(
    kernels: ctypes.CDLL, x: Tensor, n: int, m: int, method: str, seed: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """Returns values (rows, cols / 2) and metadata as 16-bit words, padded to whole tiles."""
    rows = -(-x.shape[0] // TILE_ROWS) * TILE_ROWS
    cols = -(-x.shape[1] // TILE_COLS) * TILE_COLS
    packed = torch.full((rows * cols // 16 * 9,), 7, dtype=x.dtype)
    kernels.pack_on_host(
        *memory_of(x),
        *map(ctypes.c_int64, (*x.shape, *x.stride())),
        DTYPES_BY_KERNEL.index(x.dtype),
        METHODS_BY_KERNEL.index(method),
        n,
        m,
        ctypes.c_int64(seed.item()),
        LAYOUTS.index(layout),
        ctypes.c_int64(rows),
        ctypes.c_int64(cols),
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_int64(packed.nbytes),
    )
    return packed[: rows * cols // 2].view(rows, cols // 2), packed[rows * cols // 2 :].view(torch.int16)


@pytest.fixture
def shuffled(kernels: ctypes.CDLL) -> Iterator[None]:
    """Runs the threads of a block in another order."""
    kernels.set_order_on_host(ctypes.c_uint64(7))
    yield
    kernels.set_order_on_host(ctypes.c_uint64(0))


@pytest.mark.usefixtures("shuffled")
def test_threads_in_any_order(kernels: ctypes.CDLL) -> None:
    for shape, dim in (((2, 1300, 40), -1), ((2, 8, 40, 41), 1), ((3, 5000), -1)):
        x, seed = torch.randn(shape), draw_seed()
        for method in FIXED_METHODS:
            actual, _ = prune(kernels, x, 2, 4, dim, method, seed)
            same_as_reference(actual, torch.ops.sdgp.prune_nm(x, 2, 4, dim, method, seed), method)
    x, seed = torch.randn(300, 200).half(), draw_seed()
    for matrix in (x, x.t()):
        values, metadata = pack(kernels, matrix, 2, 4, "mvue", seed, "cutlass_sm80")
        dense = sparse_semi_structured_to_dense_cutlass(values, metadata.view(values.shape[0], -1))
        same(dense, padded(torch.ops.sdgp.prune_nm(matrix, 2, 4, -1, "mvue", seed)))


def padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % TILE_COLS, 0, -x.shape[0] % TILE_ROWS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["magnitude", "random", "rescale_group", "mvue"])
@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (1, 8), (2, 8), (2, 16), (1, 32)])
@pytest.mark.parametrize("shape", [(256, 192), (130, 70), (3, 200), (128, 64)])
@pytest.mark.parametrize("columns", [False, True])
def test_packs_what_prune_nm_keeps(
    kernels: ctypes.CDLL,
    dtype: torch.dtype,
    method: str,
    pattern: tuple[int, int],
    shape: tuple[int, int],
    columns: bool,
) -> None:
    """With ``columns``, these are contiguous in memory: the matrix is a transposed one."""
    if columns and pattern[1] != 4:
        pytest.skip("the op copies it")
    x, seed = (torch.randn(shape[::-1]).t() if columns else torch.randn(shape)).to(dtype), draw_seed()
    assert x.stride(0) == 1 if columns else x.stride(1) == 1
    values, metadata = pack(kernels, x, *pattern, method, seed, "cutlass_sm80")
    rows, cols = values.shape[0], 2 * values.shape[1]
    dense = sparse_semi_structured_to_dense_cutlass(values, metadata.view(rows, cols // 16))
    same(dense, padded(torch.ops.sdgp.prune_nm(x, *pattern, -1, method, seed)))


def test_strided_rows_and_special_values(kernels: ctypes.CDLL) -> None:
    x = torch.randn(128, 80).half()
    x[torch.rand_like(x) < 0.1] = torch.inf
    x[torch.rand_like(x) < 0.1] = -0.0
    for view in (x[:, :64], x[:, 3:67]):  # rows that begin aligned and unaligned
        values, metadata = pack(kernels, view, 2, 4, "magnitude", draw_seed(), "cutlass_sm80")
        dense = sparse_semi_structured_to_dense_cutlass(values, metadata.view(128, 4))
        same(dense, sdgp.prune_nm(view, 2, 4))
        for method in ("magnitude", "mvue"):
            seed = draw_seed()
            values, metadata = pack(kernels, view.t(), 2, 4, method, seed, "cutlass_sm80")
            dense = sparse_semi_structured_to_dense_cutlass(values, metadata.view(128, 8))
            same(dense, padded(torch.ops.sdgp.prune_nm(view.t(), 2, 4, -1, method, seed)))


def full_24(rows: int, cols: int) -> Tensor:
    """Makes a matrix with exactly two nonzeros in every four values."""
    return sdgp.prune_nm(torch.rand(rows, cols).half() + 1, 2, 4)


def test_metadata_is_that_of_cutlass(kernels: ctypes.CDLL) -> None:
    x = full_24(256, 192)
    values, metadata = pack(kernels, x, 2, 4, "magnitude", draw_seed(), "cutlass_sm80")
    expected_values, expected_metadata = sparse_semi_structured_from_dense_cutlass(x)
    assert torch.equal(values, expected_values)
    assert torch.equal(metadata, expected_metadata.flatten())


def nibbles(x: Tensor) -> Tensor:
    """Returns the two places of each quad in 4 bits, as (rows, cols / 4)."""
    places = (x.view(x.shape[0], -1, 4) != 0).nonzero()[:, 2].view(x.shape[0], -1, 2)
    return places[..., 0] | places[..., 1] << 2


def test_metadata_of_cusparselt_on_hopper(kernels: ctypes.CDLL) -> None:
    rows, cols = 256, 192
    x = full_24(rows, cols)
    quads = nibbles(x)
    expected = torch.zeros(rows * cols // 8, dtype=torch.int64)
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    for row in range(rows):
        for quad in range(cols // 4):
            col = 4 * quad
            at = col // 32 * 256 + row % 8 * 8 + row % 64 // 16 * 64 + row // 64 * 8 * cols
            at += order.index(quad % 8)  # a byte holds rows r and r + 8
            expected[at] |= quads[row, quad] << (4 * (row % 16 // 8))
    for matrix in (x, x.t().contiguous().t()):  # contiguous rows, contiguous columns
        values, metadata = pack(kernels, matrix, 2, 4, "magnitude", draw_seed(), "cusparselt_sm90")
        assert torch.equal(values, x[x != 0].view(rows, cols // 2))
        assert torch.equal(metadata.view(torch.uint8), expected.to(torch.uint8))


def test_metadata_of_cusparselt_on_ampere(kernels: ctypes.CDLL) -> None:
    # CUTLASS's layout within 32 x 32 squares. The squares form 128 x 64 tiles, and both run down the columns.
    rows, cols = 256, 192
    x = full_24(rows, cols)
    _, metadata = pack(kernels, x, 2, 4, "magnitude", draw_seed(), "cusparselt_sm80")
    tiles = metadata.view(cols // 64, rows // 128, 2, 4, 64)  # (tile col, tile row, square col, square row, words)
    for row in range(0, rows, 32):
        for col in range(0, cols, 32):
            square = x[row : row + 32, col : col + 32].contiguous()
            _, expected = sparse_semi_structured_from_dense_cutlass(square)
            actual = tiles[col // 64, row // 128, col % 64 // 32, row % 128 // 32]
            assert torch.equal(actual, expected.flatten())


LISTING = """
    Function : prune_x
        /*0000*/  @P0 EXIT ;              /* 0x0 */
        /*0010*/  IADD3 R1, R1, R2 ;
        /*0020*/  @!P1 BRA 0x50 ;
        /*0030*/  LDG.E.U16 R3, desc[UR4][R2.64] ;
        /*0040*/  BRA 0x70 ;
        /*0050*/  FADD R3, R3, R4 ;
        /*0060*/  @P2 BRA 0x90 ;
        /*0070*/  STG.E R3 ;
        /*0080*/  EXIT ;
        /*0090*/  ISETP.GT.AND P3, PT, R3, RZ, PT ;
        /*00a0*/  BRA 0x70 ;
        /*00b0*/  BRA 0xb0 ;
"""


def test_the_longest_path_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sass  # type: ignore[import-not-found]

    code = sass.functions(LISTING)["prune_x"]
    assert sass.longest_path(code) == (9, 2)  # through 0x90, not through the load of a single element
    with pytest.raises(ValueError, match="a loop"):
        sass.longest_path([(at, text.replace("0x70", "0x10")) for at, text in code])


# Stands in for a driver that is newer than any runtime. The CUDA runtime looks up the driver's functions by name. The
# stub tells its version to any caller, and ends a process that initializes CUDA.
DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuDriverGetVersion(int* version) { *version = 99000; return 0; }
int cuInit(unsigned flags) { _Exit(3); }
static int other() { return 0; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, void* status) {
  *function = strcmp(name, "cuInit") == 0               ? (void*)cuInit
              : strcmp(name, "cuDriverGetVersion") == 0 ? (void*)cuDriverGetVersion
              : strcmp(name, "cuGetProcAddress") == 0   ? (void*)cuGetProcAddress_v2
                                                        : (void*)other;
  return 0;
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
"""
ASK = "import ctypes, sys; print(getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])())"


@pytest.mark.parametrize("library", ["on the host", "installed"])
def test_asking_for_the_driver_leaves_cuda_uninitialized(kernels: ctypes.CDLL, library: str, tmp_path: Path) -> None:
    path, function = Path(kernels._name), "driver_version_on_host"
    if library == "installed":
        path, function = Path(sdgp.cmake_prefix_path) / "lib" / "libsdgp_cuda.so", "sdgp_cuda_driver"
        if not path.exists() or torch.version.cuda is None:
            pytest.skip("needs an sdgp that was built with CUDA")
    ask = ASK if library == "on the host" else f"import torch; {ASK}"  # torch loads the library's dependencies
    (tmp_path / "driver.c").write_text(DRIVER)
    stub = tmp_path / "libcuda.so.1"
    subprocess.run(["c++", "-xc", "-w", "-shared", "-fPIC", "-o", stub, tmp_path / "driver.c"], check=True)
    command = [sys.executable, "-c", ask, path, function]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "99000\n"), result.stderr
