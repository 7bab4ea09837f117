# SPDX-License-Identifier: BSD-3-Clause
"""``sdgp doctor``: reports what is installed, loaded and usable.

The imports of sdgp are inside functions, because the command must also work if ``import sdgp`` fails.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from . import Report, installed_version

# The CPU instruction sets that sdgp's kernels or PyTorch's exact products have code for.
_INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_bf16"),
    *("asimd", "sve"),
)


def run(args: argparse.Namespace) -> Report:
    torch = _torch()
    report: Report = {
        "ok": args.broken is None,
        "error": args.broken,
        "versions": _versions(torch),
        "paths": _paths(torch),
        "libraries": _libraries(torch),
    }
    if args.broken is None:
        from . import selftest

        report |= {"cpu": _cpu(), "gpus": _gpus(), "no_gpu": _why_no_gpu(), "tests": selftest.run()}
        report["ok"] = all(row["state"] != "failed" for row in report["tests"])
    return report


def show(report: Report) -> str:
    lines = _lines({key: _with_path(value, report["paths"].get(key)) for key, value in report["versions"].items()})
    lines += ["", "Libraries", *(f"  {row['file']}: {row['state']}" for row in report["libraries"])]
    if report["error"] is not None:
        return "\n".join([*lines, "", f"import sdgp fails: {report['error']}"])
    lines += ["", "CPU", *_lines(_show_cpu(report["cpu"]), indent="  ")]
    gpus = {row["device"]: _show_gpu(row) for row in report["gpus"]}
    lines += ["", "GPU", *_lines(gpus or {"none": report["no_gpu"]}, indent="  ")]
    lines += ["", "Self-tests, each op compared with sdgp.reference"]
    lines += [f"  {row['op']:<16}{row['device']:<8}{row['state']}: {row['note']}" for row in report["tests"]]
    failed = sum(row["state"] == "failed" for row in report["tests"])
    return "\n".join(
        [*lines, "", f"{failed} of {len(report['tests'])} self-tests failed" if failed else "All self-tests passed."]
    )


def _lines(values: dict[str, Any], indent: str = "") -> list[str]:
    return [f"{indent}{key.replace('_', ' '):<16}{value}" for key, value in values.items()]


def _with_path(version: str | None, path: str | None) -> str:
    return f"{version}, {path}" if version and path else version or "none"


def _show_cpu(cpu: dict[str, Any]) -> dict[str, str]:
    return {
        "model": cpu["model"],
        "instructions": " ".join(cpu["instructions"]) or "none that sdgp uses",
        "kernels": cpu["kernels"] + (", forced by SDGP_FORCE_ISA" if cpu["forced"] else ""),
        "threads": f"{cpu['threads']} on {cpu['usable_cpus']} usable CPUs",
    }


def _show_gpu(row: dict[str, Any]) -> str:
    usable = ", ".join(name for name, missing in row["sparse_products"].items() if missing is None)
    needs = "".join(f"; {name} needs {missing}" for name, missing in row["sparse_products"].items() if missing)
    head = f"{row['name']}, compute capability {row['capability']}, {row['memory_gib']} GiB"
    return f"{head}; 2:4 sparse products in {usable or 'no dtype'}{needs}"


def _torch() -> Any:
    try:
        import torch
    except Exception as error:  # a broken torch can raise any exception
        return error
    return torch


def _cuda_of(torch: Any) -> str | None:
    version: str | None = getattr(getattr(torch, "version", None), "cuda", None)
    return version


def _versions(torch: Any) -> dict[str, str | None]:
    return {
        "sdgp": installed_version(),
        "torch": f"does not import: {torch}" if isinstance(torch, Exception) else torch.__version__,
        "torch_cuda": _cuda_of(torch),
        "nvidia_driver": _driver(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _paths(torch: Any) -> dict[str, str]:
    paths = {"sdgp": str(_folder("sdgp") or "not found"), "python": sys.executable}
    return paths if isinstance(torch, Exception) else paths | {"torch": str(Path(torch.__file__).parent)}


def _driver() -> str | None:
    """Returns the driver's version, if Linux reports it, and the newest CUDA version that the driver supports."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    cuda = f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    try:
        found = re.search(r"\d{3,}\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return f"{found[0]}, {cuda}" if found else cuda


def _libraries(torch: Any) -> list[dict[str, str]]:
    package = _folder("sdgp")
    if package is None:
        return []
    folder = _folder("sdgp._C", package) or package  # an editable installation stores it outside the sources
    names = (f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}", "lib/libsdgp.so", "lib/libsdgp_cuda.so")
    return [{"file": str(folder / name), "state": _state(folder / name, torch)} for name in names]


def _folder(name: str, package: Path | None = None) -> Path | None:
    """Returns the folder of a module without importing its package."""
    for finder in sys.meta_path:
        spec = finder.find_spec(name, None if package is None else [str(package)])
        if spec is not None and spec.origin:
            return Path(spec.origin).parent
    return None


def _state(library: Path, torch: Any) -> str:
    """Returns whether this process has mapped the library, and if not, the reason if it is known."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    if any(line.endswith(f" {library.resolve()}") for line in maps):
        return "loaded"
    of_cuda = library.name == "libsdgp_cuda.so"
    if library.exists():
        return "not loaded: torch is built without CUDA" if of_cuda and _cuda_of(torch) is None else "not loaded"
    if of_cuda:
        return "not there, as in a build without CUDA (SDGP_CUDA)"
    others = ", ".join(sorted(path.name for path in library.parent.glob("_C.*.so")))
    return f"missing; for another Python or platform there is {others}" if others else "missing"


def _cpu() -> dict[str, Any]:
    import torch

    from sdgp._load import C
    from sdgp._machine import cpu_fields, cpu_name

    fields = cpu_fields()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "model": cpu_name(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "kernels": C.isa(),
        "forced": bool(os.environ.get("SDGP_FORCE_ISA")),
        "threads": torch.get_num_threads(),
        "usable_cpus": len(os.sched_getaffinity(0)),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> dict[str, Any]:
    import torch

    from sdgp import Pattern
    from sdgp._semi_structured import obstacle

    properties = torch.cuda.get_device_properties(index)
    device = torch.device("cuda", index)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return {
        "device": str(device),
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        # For each dtype, the missing requirement, or None.
        "sparse_products": {
            str(dtype).removeprefix("torch."): obstacle(device, dtype, Pattern(2, 4)) for dtype in dtypes
        },
    }


def _why_no_gpu() -> str | None:
    import torch

    init: Any = torch.cuda.init
    try:
        init()
    except (AssertionError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None if torch.cuda.device_count() else "no device is visible"
