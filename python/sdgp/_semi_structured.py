# SPDX-License-Identifier: BSD-3-Clause
"""The sparse product on CUDA: PyTorch's semi-structured (2:4) product. sdgp prunes and packs its operand in one pass.

``torch.sparse`` has two of them: cuSPARSELt, and CUTLASS on GPUs of compute capability 8.x. cuSPARSELt does not
document the order of its metadata. So sdgp compares its own metadata with that of cuSPARSELt's compressor, once per
device and dtype. If they differ, that compressor packs the operand.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from ._load import C
from ._ops import pack_24, prune_nm
from ._pattern import Pattern

TILE_ROWS, TILE_COLS = C.tile_24  # an operand consists of complete tiles
_DENSE_MULTIPLE = 8  # the columns of the dense operand must be a multiple of this
_FLOAT8_MULTIPLE = 16  # the same for float8
_ALIGNMENT = 16  # bytes; the address of the dense operand must be a multiple of this


def obstacle(device: torch.device, dtype: torch.dtype, pattern: Pattern) -> str | None:
    """Returns what the product needs and does not have, as "requirement, got actual", or None if nothing is missing."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"float16 or bfloat16 on cuda (torch.autocast), got {str(dtype).removeprefix('torch.')}"
    if not pattern.fits_24:
        return f"a pattern that 2:4 tensor cores take (n <= 2 and m a multiple of 4, or 1:2), got {pattern}"
    return _obstacle_of_device(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _obstacle_of_device(index: int) -> str | None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("sdgp::_pack_24", "CUDA"):
        return "sdgp's CUDA kernels, got an sdgp that was built without CUDA (option SDGP_CUDA)"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"a GPU of compute capability 8.0 or newer, got {major}.{minor}"
    if major > 8 and not torch.backends.cusparselt.is_available():
        return f"a torch with cuSPARSELt, got torch {torch.__version__} without it"
    return None


class Algorithm(NamedTuple):
    """An algorithm of cuSPARSELt, as the arguments of PyTorch's operator name it."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


DEFAULT = Algorithm()


class Operand(NamedTuple):
    """A pruned matrix (rows, cols) in the form that the product takes.

    Attributes:
        packed: (padded rows, ...): the kept values, then the metadata, in one buffer.
        layout: the layout of the metadata. None: cuSPARSELt's own compressor wrote it.
    """

    packed: Tensor
    layout: str | None
    rows: int
    cols: int
    padded_cols: int


def pack(matrix: Tensor, pattern: Pattern, method: str, seed: Tensor | None = None) -> Operand:
    """Prunes a matrix (rows, cols) along its rows, as ``sdgp.prune_nm`` does, and packs it."""
    n, m = pattern
    rows, cols = matrix.shape
    padded_rows, padded_cols = _round_up(rows, TILE_ROWS), _round_up(cols, TILE_COLS)
    layout = metadata_layout(matrix.device.index, matrix.dtype)
    if layout is None:
        pruned = F.pad(prune_nm(matrix, n, m, -1, method, seed), (0, padded_cols - cols, 0, padded_rows - rows))
        return Operand(torch._cslt_compress(pruned.contiguous()), None, rows, cols, padded_cols)
    packed = pack_24(matrix, n, m, method, seed, layout).view(padded_rows, padded_cols // 16 * 9)
    return Operand(packed, layout, rows, cols, padded_cols)


def multiply(operand: Operand, dense: Tensor, algorithm: Algorithm = DEFAULT) -> Tensor:
    """Multiplies (rows, cols) by ``dense`` (cols, columns) and returns (rows, columns)."""
    columns = dense.shape[1]
    if operand.packed.numel() == 0 or columns == 0:
        return dense.new_zeros(operand.rows, columns)
    product = _multiply_packed(operand.packed, operand.layout, operand.padded_cols, _padded(operand, dense), algorithm)
    return product[: operand.rows, :columns]


def search(operand: Operand, dense: Tensor) -> Algorithm:
    """Returns the algorithm that cuSPARSELt finds for ``multiply``, or the default if the product is CUTLASS's."""
    if operand.layout == "cutlass_sm80" or operand.packed.numel() == 0 or dense.shape[1] == 0:
        return DEFAULT
    # torch._cslt_sparse_mm_search returns the id alone, without split_k.
    cusparselt: Any = torch._C._cusparselt
    *found, _ = cusparselt.mm_search(operand.packed, _padded(operand, dense), None, None, None, False)
    return Algorithm(*found)


def _padded(operand: Operand, dense: Tensor) -> Tensor:
    """Returns ``dense`` with the size and at an address that the libraries accept. A view may begin anywhere."""
    missing = (0, -dense.shape[1] % _DENSE_MULTIPLE, 0, operand.padded_cols - operand.cols)
    if any(missing):
        dense = F.pad(dense, missing)
    dense = dense.contiguous()
    return dense.clone() if dense.storage_offset() * dense.element_size() % _ALIGNMENT else dense


def _multiply_packed(
    packed: Tensor, layout: str | None, cols: int, dense: Tensor, algorithm: Algorithm = DEFAULT
) -> Tensor:
    result: Tensor
    if layout == "cutlass_sm80":
        rows, buffer = packed.shape[0], packed.flatten()
        values = buffer[: rows * cols // 2].view(rows, cols // 2)
        metadata = buffer[rows * cols // 2 :].view(torch.int16).view(rows, cols // 16)
        result = torch._sparse_semi_structured_mm(values, metadata, dense)
    else:
        alg_id, split_k, split_k_mode = algorithm
        result = torch._cslt_sparse_mm(packed, dense, alg_id=alg_id, split_k=split_k, split_k_mode=split_k_mode)
    return result


@functools.cache
def metadata_layout(index: int, dtype: torch.dtype) -> str | None:
    """Finds, by trying, the layout that a device's product reads. If sdgp knows none, it logs that and returns None."""
    device = torch.device("cuda", index)
    if not torch.backends.cusparselt.is_available():
        return "cutlass_sm80"
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(2 * TILE_ROWS, 3 * TILE_COLS, dtype=torch.float32, device=device, generator=generator).to(
        dtype
    )
    expected = torch._cslt_compress(prune_nm(matrix, 2, 4)).flatten().view(torch.int16)
    newest_first = ("cusparselt_sm90", "cusparselt_sm80")
    for layout in newest_first:
        if torch.equal(pack_24(matrix, 2, 4, "magnitude", None, layout).view(torch.int16), expected):
            return layout
    major, minor = torch.cuda.get_device_capability(index)
    # No warning, because that would end a training run that turns warnings into errors.
    logging.getLogger("sdgp").warning(
        "sdgp does not know the order of this GPU's 2:4 metadata (compute capability %d.%d, CUDA %s); PyTorch's own "
        "compressor packs instead, in a pass of its own",
        major,
        minor,
        torch.version.cuda,
    )
    return None


# A product in float8: both factors are float8_e4m3fn, and each row of the result has a scale.


_float8_obstacles: dict[int, str | None] = {}  # by the index of the device


def float8_obstacle(device: torch.device, dtype: torch.dtype, pattern: Pattern, casts: str) -> str | None:
    """Does what ``obstacle`` does, for the product in float8. ``casts`` is the name of torchao's casts."""
    if device.type != "cuda":
        return f"cuda for float8, got {device}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"float16, bfloat16 or float32 around the float8 product, got {str(dtype).removeprefix('torch.')}"
    if not pattern.fits_24:
        return f"a pattern that 2:4 tensor cores take (n <= 2 and m a multiple of 4, or 1:2), got {pattern}"
    if "dis_" in casts or "emulate" in casts:
        return f"two factors that are cast to float8 and not emulated, got {casts}"
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _float8_obstacles:
        if torch.cuda.is_current_stream_capturing():
            return "a float8 product that was checked before the capture of a CUDA graph, got none"
        _float8_obstacles[index] = _float8_obstacle_of_device(index)
    return _float8_obstacles[index]


def _float8_obstacle_of_device(index: int) -> str | None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("sdgp::prune_nm", "CUDA"):
        return "sdgp's CUDA kernels, got an sdgp that was built without CUDA (option SDGP_CUDA)"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < (8, 9):
        return f"a GPU of compute capability 8.9 or newer for float8, got {major}.{minor}"
    if not torch.backends.cusparselt.is_available():
        return f"a torch with cuSPARSELt, got torch {torch.__version__} without it"
    if not _multiplies_float8(torch.device("cuda", index)):
        return f"a cuSPARSELt that multiplies float8 with a scale per row, got {torch.backends.cusparselt.version()}"
    return None


def _multiplies_float8(device: torch.device) -> bool:
    """Returns whether the product is right for a small example. cuSPARSELt's documentation does not promise it."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float32, device=device, generator=generator)

    with torch.no_grad(), _disable_current_modes(), torch.autocast(device.type, enabled=False):
        matrix = prune_nm(random(2 * TILE_ROWS, TILE_COLS), 2, 4).to(torch.float8_e4m3fn)
        dense, scale = random(TILE_COLS // 2, TILE_COLS).to(torch.float8_e4m3fn), random(2 * TILE_ROWS)
        expected = scale[:, None] * (matrix.float() @ dense.float().t())
        try:
            actual = multiply_float8(matrix, dense, scale, torch.bfloat16).float()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        return torch.allclose(actual, expected, rtol=2**-7, atol=2**-7)


@torch.library.custom_op("sdgp::_multiply_float8", mutates_args=())
def multiply_float8(matrix: Tensor, dense: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies a pruned matrix (rows, cols) by the transpose of ``dense`` (columns, cols).

    Row i of the result (rows, columns), in ``dtype``, is multiplied by ``scale[i]``. Both factors are float8_e4m3fn.
    This is an operator because torch.compile cannot trace the compressor.
    """
    rows, cols = matrix.shape
    columns = dense.shape[0]
    if matrix.numel() == 0 or columns == 0:
        return matrix.new_zeros(rows, columns, dtype=dtype)
    missing_rows, missing_cols = -rows % TILE_ROWS, -cols % TILE_COLS
    packed = torch._cslt_compress(_pad_bytes(matrix, missing_rows, missing_cols))
    other = _pad_bytes(dense, -columns % _FLOAT8_MULTIPLE, missing_cols)
    product = torch._cslt_sparse_mm(packed, other.t(), alpha=F.pad(scale, (0, missing_rows)), out_dtype=dtype)
    return product[:rows, :columns].contiguous()


@multiply_float8.register_fake
def _(matrix: Tensor, dense: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.new_empty(matrix.shape[0], dense.shape[0], dtype=dtype)


@register_flop_formula(torch.ops.sdgp._multiply_float8)
def _(matrix: Sequence[int], dense: Sequence[int], *_: Any, **__: Any) -> int:
    return matrix[0] * matrix[1] * dense[0]  # half of the values of the matrix count


def _pad_bytes(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """Appends rows and columns of zeros to a matrix of one-byte values."""
    return F.pad(matrix.view(torch.uint8), (0, cols, 0, rows)).contiguous().view(matrix.dtype)


def _round_up(size: int, step: int) -> int:
    return (size + step - 1) // step * step
