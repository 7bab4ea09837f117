# SPDX-License-Identifier: BSD-3-Clause
"""N:M patterns, and the settings of a layer as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ._load import C

METHODS: tuple[str, ...] = C.methods
METHODS_THAT_DRAW: tuple[str, ...] = C.methods_that_draw
METHODS_BY_GROUP: tuple[str, ...] = C.methods_by_group  # a group's result depends on that group alone
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
        if isinstance(pattern, str):
            # No regular expression: torch.compile traces this, and some versions of it do not know re.
            texts = pattern.split(":")
            if all(text.isascii() and text.isdigit() and len(text) <= 4 for text in texts):
                parts = tuple(int(text) for text in texts)
        if isinstance(parts, (tuple, list)) and len(parts) == 2:
            n, m = parts
            if type(n) is int and type(m) is int and 1 <= n <= m <= MAX_GROUP_SIZE:
                return cls(n, m)
        raise ValueError(f'pattern: expected "n:m" or (n, m) with 1 <= n <= m <= {MAX_GROUP_SIZE}, got {pattern!r}')

    @property
    def fits_24(self) -> bool:
        """Whether every group of four keeps at most two values, as 2:4 tensor cores need it."""
        return (self.n <= 2 and self.m % 4 == 0) or self == (1, 2)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


PatternLike: TypeAlias = str | tuple[int, int] | Pattern


@dataclass(frozen=True)
class Pruning:
    """The settings of a layer: how it prunes its data gradient, and which product may multiply the result.

    Attributes:
        pattern: of the output gradient, along the output features.
        method: one of ``METHODS``, see ``sdgp.prune_nm``.
        backend: one of ``BACKENDS``, see ``sdgp.linear``.
    """

    pattern: Pattern
    method: str
    backend: str

    @classmethod
    def parse(cls, op: str, pattern: PatternLike, method: str, backend: str) -> Pruning:
        """Checks the settings; the message of what it raises begins with ``op``."""
        if method not in METHODS:
            raise ValueError(f"{op}: expected method to be one of {', '.join(METHODS)}, got {method!r}")
        if backend not in BACKENDS:
            raise ValueError(f"{op}: expected backend to be one of {', '.join(BACKENDS)}, got {backend!r}")
        return cls(pattern=Pattern.parse(pattern), method=method, backend=backend)

    @property
    def is_identity(self) -> bool:
        """Whether every value stays: n == m."""
        return self.pattern.n == self.pattern.m

    def __str__(self) -> str:
        return f"pattern={self.pattern}, method={self.method}, backend={self.backend}"
