# SPDX-License-Identifier: BSD-3-Clause
"""Tests what `import sdgp` says about a broken installation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import sdgp
from sdgp import _load


def import_under(tmp_path: Path, files: dict[str, str], **environment: str) -> str:
    """Returns the last line of stderr of `import sdgp`, with some modules replaced."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", "import sdgp"],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def test_old_torch(tmp_path: Path) -> None:
    last = import_under(tmp_path, {"torch.py": "__version__ = '2.9.1+cpu'"})
    assert last == "ImportError: sdgp needs torch >= 2.10, found 2.9.1+cpu: pip install --upgrade 'torch>=2.10'"


def test_no_torch(tmp_path: Path) -> None:
    last = import_under(tmp_path, {"torch.py": "raise ImportError('gone')"})
    assert last == "ImportError: sdgp needs torch >= 2.10, found none that imports: pip install 'torch>=2.10'"


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    last = import_under(tmp_path, {"torch.py": "__version__ = '2.13.0'"})  # a torch without libraries
    assert last.startswith("ImportError: sdgp's compiled library did not load under torch 2.13.0: ")
    assert last.endswith("reinstall sdgp (a source checkout is not importable in place: pip install -e .)")


def test_a_library_of_another_python(tmp_path: Path) -> None:
    if any("editable" in type(finder).__module__ for finder in sys.meta_path):
        pytest.skip("an editable installation is found before any other")
    package = tmp_path / "sdgp"
    shutil.copytree(Path(sdgp.__file__).parent, package, ignore=shutil.ignore_patterns("_C.*.so", "lib"))
    (package / "_C.cpython-39-aarch64-linux-gnu.so").touch()
    last = import_under(tmp_path, {})
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert last == (
        f"ImportError: sdgp was built for another Python or platform: this one loads _C{suffix}, "
        "found _C.cpython-39-aarch64-linux-gnu.so: reinstall sdgp with this Python's pip"
    )


@pytest.mark.parametrize("driver", [0, 13000, 13020, 14000])
def test_a_driver_that_runs_the_cuda_library(driver: int) -> None:
    _load.check_driver(13010, driver, "torch 2.14.1+cu130")


def test_an_older_driver() -> None:
    message = (
        r"^sdgp's CUDA library was built with CUDA 13\.1 and needs a driver for CUDA 13\.0 or newer, "
        r"found torch 2\.10\.0\+cu128 on a driver for CUDA 12\.8: update the driver, build sdgp with the CUDA "
    )
    with pytest.raises(ImportError, match=message):
        _load.check_driver(13010, 12080, "torch 2.10.0+cu128")


def test_unknown_instruction_set(tmp_path: Path) -> None:
    last = import_under(tmp_path, {}, SDGP_FORCE_ISA="sse9")
    assert re.fullmatch(
        r"RuntimeError: SDGP_FORCE_ISA: expected an instruction set that this CPU runs \((.*, )?baseline\), got sse9",
        last,
    )
