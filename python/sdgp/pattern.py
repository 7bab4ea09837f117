# SPDX-License-Identifier: BSD-3-Clause
"""N:M patterns, and the settings of a layer as one small value."""

from __future__ import annotations

import re
from typing import NamedTuple, TypeAlias

from ._load import C

METHODS: tuple[str, ...] = C.methods
BACKENDS = ("auto", "pruned", "sparse", "dense")
MAX_GROUP_SIZE: int = C.max_group_size


class Pattern(NamedTuple):
    """At most ``n`` of every ``m`` consecutive values stay, ``1 <= n <= m <= 64``.

    Examples:
        >>> sdgp.Pattern.parse("2:4")
        Pattern(n=2, m=4)
    """

    n: int
    m: int

    @classmethod
    def parse(cls, pattern: PatternLike) -> Pattern:
        """Reads ``"n:m"``, ``(n, m)`` or a Pattern.

        Raises:
            ValueError: where it is none of these, or not ``1 <= n <= m <= 64``.
        """
        parts: object = pattern
        if isinstance(pattern, str) and (found := re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern)):
            parts = tuple(map(int, found.groups()))
        if isinstance(parts, (tuple, list)) and len(parts) == 2:
            n, m = parts
            if type(n) is int and type(m) is int and 1 <= n <= m <= MAX_GROUP_SIZE:
                return cls(n, m)
        raise ValueError(f'pattern: expected "n:m" or (n, m) with 1 <= n <= m <= {MAX_GROUP_SIZE}, got {pattern!r}')

    @property
    def fits_24(self) -> bool:
        """Whether what it keeps is 2:4 too: at most two of every four."""
        n, m = self
        return (n <= 2 and m % 4 == 0) or (n, m) == (1, 2)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


PatternLike: TypeAlias = str | tuple[int, int] | Pattern


class Pruning(NamedTuple):
    """How a layer prunes its data gradient."""

    pattern: Pattern
    method: str
    backend: str

    @classmethod
    def parse(cls, op: str, pattern: PatternLike, method: str, backend: str) -> Pruning:
        """Checks the three settings; ``op`` begins the message of what it raises."""
        if method not in METHODS:
            raise ValueError(f"{op}: expected method to be one of {', '.join(METHODS)}, got {method!r}")
        if backend not in BACKENDS:
            raise ValueError(f"{op}: expected backend to be one of {', '.join(BACKENDS)}, got {backend!r}")
        return cls(Pattern.parse(pattern), method, backend)
