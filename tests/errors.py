# SPDX-License-Identifier: BSD-3-Clause
"""Helpers of the tests of error messages."""

from __future__ import annotations

import re
from typing import Any

import torch


def message(op: str, requirement: str, got: str) -> str:
    """Returns the pattern of an op's error: the op's name, the important words of what it expected, and what it got."""
    return f"^{op}: expected .*{re.escape(requirement)}.*, got {re.escape(got)}"


class Elsewhere(torch.Tensor):
    """A tensor without data that claims to be on a device that this torch may lack."""

    @staticmethod
    def on(device: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (1,)) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(Elsewhere, shape, device=device, dtype=dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        python = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
        with torch._C._ExcludeDispatchKeyGuard(
            python | torch._C.DispatchKeySet(torch._C.DispatchKey.PythonTLSSnapshot)
        ):
            return func(*args, **kwargs or {})


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    return Elsewhere.on("xpu", x.dtype, tuple(x.shape))
