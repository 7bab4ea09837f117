# SPDX-License-Identifier: BSD-3-Clause
"""Loads the op library, or raises an ImportError that says what was expected and what was found."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import sysconfig
from pathlib import Path
from types import ModuleType

OLDEST_TORCH = (2, 10)

_HERE = Path(__file__).parent
_WITHOUT_CUDA = "pip install --no-binary sdgp sdgp -C cmake.define.SDGP_CUDA=OFF"


def _load() -> ModuleType:
    torch = _import_torch()
    compiled = _import_compiled(torch.__version__)
    installed = _installed_version()
    if installed is not None and compiled.version != installed:
        raise ImportError(
            f"sdgp is installed as {installed}, found a compiled library of {compiled.version}: reinstall sdgp"
        )
    compiled.isa()  # an invalid SDGP_FORCE_ISA must fail here, not in a backward
    cuda = Path(compiled.__file__ or "").parent / "lib" / "libsdgp_cuda.so"
    if torch.version.cuda is not None and cuda.exists():
        _load_cuda(cuda, f"torch {torch.__version__}")
    return compiled


def _installed_version() -> str | None:
    """Returns the version that the installer recorded, or None without metadata, as in a frozen application."""
    try:
        return importlib.metadata.version("sdgp")
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_torch() -> ModuleType:
    expected = f"sdgp needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{expected}, found none that imports: pip install 'torch>=2.10'") from error
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise ImportError(f"{expected}, found {torch.__version__}: pip install --upgrade 'torch>=2.10'")
    return torch


def _import_compiled(torch_version: str) -> ModuleType:
    try:
        from . import _C
    except ImportError as error:
        expected = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        others = sorted(path.name for path in _HERE.glob("_C.*.so") if path.name != expected)
        if others and not (_HERE / expected).exists():
            raise ImportError(
                f"sdgp was built for another Python or platform: this one loads {expected}, found {', '.join(others)}: "
                "reinstall sdgp with this Python's pip"
            ) from error
        raise ImportError(
            f"sdgp's compiled library did not load under torch {torch_version}: {error}; "
            "reinstall sdgp (a source checkout is not importable in place: pip install -e .)"
        ) from error
    return _C


def _load_cuda(path: Path, torch: str) -> None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"sdgp's CUDA library did not load under {torch}: {error}; reinstall sdgp, or build it without CUDA: "
            f"{_WITHOUT_CUDA}"
        ) from error
    check_driver(library.sdgp_cuda_runtime(), library.sdgp_cuda_driver(), torch)


def check_driver(runtime: int, driver: int, torch: str) -> None:
    """Raises an ImportError if the driver's major CUDA version is too old to run any kernel of the library.

    torch may have another CUDA version: the two share only the driver. Versions are numbers as CUDA writes them; 0
    means that there is no driver.
    """
    if 0 < driver < runtime // 1000 * 1000:
        raise ImportError(
            f"sdgp's CUDA library was built with CUDA {_dotted(runtime)} and needs a driver for CUDA "
            f"{runtime // 1000}.0 or newer, found {torch} on a driver for CUDA {_dotted(driver)}: update the driver, "
            f"build sdgp with the CUDA version of the driver, or without CUDA: {_WITHOUT_CUDA}"
        )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


C = _load()
version: str = C.version

#: For CMake: ``-DCMAKE_PREFIX_PATH=$(python -c "import sdgp; print(sdgp.cmake_prefix_path)")``.
cmake_prefix_path: str = str(Path(C.__file__ or "").parent)
