# SPDX-License-Identifier: BSD-3-Clause
"""Loads the op library, or raises one ImportError that says what was found and what was expected."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
from pathlib import Path
from types import ModuleType

OLDEST_TORCH = (2, 10)


def _load() -> ModuleType:
    expected = f"sdgp needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{expected}, found none that imports: pip install 'torch>=2.10'") from error
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise ImportError(f"{expected}, found {torch.__version__}: pip install --upgrade 'torch>=2.10'")
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(
            f"sdgp's compiled library did not load under torch {torch.__version__}: {error}; "
            "reinstall sdgp (a source checkout is not importable in place: pip install -e .)"
        ) from error
    installed = importlib.metadata.version("sdgp")
    if _C.version != installed:
        raise ImportError(f"sdgp is installed as {installed}, found a compiled library of {_C.version}: reinstall sdgp")
    _C.isa()  # an unusable SDGP_FORCE_ISA fails here, not in some backward pass
    cuda = Path(_C.__file__ or "").parent / "lib" / "libsdgp_cuda.so"
    if torch.version.cuda is not None and cuda.exists():
        try:
            ctypes.CDLL(str(cuda))
        except OSError as error:
            raise ImportError(
                f"sdgp's CUDA library did not load under torch {torch.__version__}: {error}; reinstall sdgp, or build "
                "it without: pip install . -C cmake.define.SDGP_CUDA=OFF"
            ) from error
    return _C


C = _load()
version: str = C.version

#: For CMake: ``-DCMAKE_PREFIX_PATH=$(python -c "import sdgp; print(sdgp.cmake_prefix_path)")``.
cmake_prefix_path: str = str(Path(C.__file__ or "").parent)
