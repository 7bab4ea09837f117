# SPDX-License-Identifier: BSD-3-Clause
"""N:M patterns, and the settings of a layer as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ._load import C

METHODS: tuple[str, ...] = C.methods
METHODS_THAT_DRAW: tuple[str, ...] = C.methods_that_draw
METHODS_BY_GROUP: tuple[str, ...] = C.methods_by_group  # the sparse products prune with it themselves
UNBIASED_METHODS: tuple[str, ...] = C.methods_unbiased
BACKENDS = ("auto", "pruned", "sparse", "dense")
MAX_GROUP_SIZE: int = C.max_group_size


def methods_on(device: str) -> tuple[str, ...]:
    """Returns the methods that prune on devices of this type."""
    methods: tuple[str, ...] = C.methods_on_cuda
    return methods if device == "cuda" else METHODS


class Pattern(NamedTuple):
    """An N:M pattern: at most ``n`` of every ``m`` consecutive values stay, ``1 <= n <= m <= 64``.

    Only ``parse`` checks the numbers.

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
            ValueError: If ``pattern`` is none of these, or not ``1 <= n <= m <= 64``.
        """
        read = _read(pattern)
        if read is None:
            raise ValueError(f"pattern: expected {_PATTERN}, got {pattern!r}")
        return cls(*read)

    @property
    def fits_24(self) -> bool:
        """Whether every group of four values keeps at most two, as 2:4 tensor cores require."""
        return (self.n <= 2 and self.m % 4 == 0) or self == (1, 2)

    @property
    def wider(self) -> Pattern | None:
        """A pattern with the same density and larger groups, or None if none is known.

        It takes the same time on a CPU and adds less noise: 8:16 for 2:4, 4:16 for 1:4.
        """
        n, m = self
        if n == m or m not in (2, 4, 8, 16):
            return None
        times = max(4 // n, 16 // m)
        return Pattern(n * times, m * times) if times > 1 else None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


PatternLike: TypeAlias = str | tuple[int, int] | Pattern

_PATTERN = f'"n:m" or (n, m) with 1 <= n <= m <= {MAX_GROUP_SIZE}'


def _read(pattern: object) -> tuple[int, int] | None:
    """Returns n and m, or None if ``pattern`` is not a pattern."""
    parts = pattern
    if isinstance(pattern, str):
        # No regular expression: torch.compile traces this code, and some versions of it do not support re.
        texts = pattern.split(":")
        if all(text.isascii() and text.isdigit() and len(text) <= 4 for text in texts):
            parts = tuple(int(text) for text in texts)
    if isinstance(parts, (tuple, list)) and len(parts) == 2:
        n, m = parts
        if type(n) is int and type(m) is int and 1 <= n <= m <= MAX_GROUP_SIZE:
            return n, m
    return None


class WeightGrad(NamedTuple):
    """How to prune the gradient that enters a weight-gradient product, along rows or output pixels."""

    pattern: Pattern
    method: str

    @classmethod
    def parse(cls, op: str, weight_grad: WeightGradLike | None) -> WeightGrad | None:
        """Reads a pattern, which gets the method mvue, or a pair (pattern, method). None stays None.

        Raises:
            ValueError: If ``weight_grad`` is none of these. The message begins with ``op``.
        """
        if weight_grad is None:
            return None
        pattern: object = weight_grad
        method = "mvue"
        if isinstance(weight_grad, (tuple, list)) and len(weight_grad) == 2 and isinstance(weight_grad[1], str):
            pattern, method = weight_grad[0], weight_grad[1]
        read = _read(pattern)
        if read is None:
            raise ValueError(
                f"{op}: expected weight_grad to be a pattern, {_PATTERN}, or (pattern, method), got {weight_grad!r}"
            )
        if method not in METHODS:
            raise ValueError(f"{op}: expected weight_grad's method to be one of {', '.join(METHODS)}, got {method!r}")
        return cls(Pattern(*read), method)

    def __str__(self) -> str:
        return f"{self.pattern} {self.method}"


WeightGradLike: TypeAlias = PatternLike | tuple[PatternLike, str] | WeightGrad


@dataclass(frozen=True)
class Pruning:
    """The settings of a layer, or of one of its two products (``data`` and ``weight``).

    They say how to prune the data gradient and, on request, the weight gradient, and which products may compute them.

    Attributes:
        pattern: the pattern of the output gradient, along the output features.
        method: one of ``METHODS``, as in ``sdgp.prune_nm``.
        backend: one of ``BACKENDS``, as in ``sdgp.linear``.
        weight_grad: how to prune the output gradient that enters the weight gradient. None: that gradient is exact.
    """

    pattern: Pattern
    method: str
    backend: str
    weight_grad: WeightGrad | None = None

    @classmethod
    def parse(
        cls, op: str, pattern: PatternLike, method: str, backend: str, weight_grad: WeightGradLike | None = None
    ) -> Pruning:
        """Checks and reads the settings. Error messages begin with ``op`` or with the name of the setting."""
        if method not in METHODS:
            raise ValueError(f"{op}: expected method to be one of {', '.join(METHODS)}, got {method!r}")
        if backend not in BACKENDS:
            raise ValueError(f"{op}: expected backend to be one of {', '.join(BACKENDS)}, got {backend!r}")
        return cls(
            pattern=Pattern.parse(pattern),
            method=method,
            backend=backend,
            weight_grad=WeightGrad.parse(op, weight_grad),
        )

    @property
    def data(self) -> Pruning:
        """The settings of the data gradient only."""
        return self if self.weight_grad is None else Pruning(self.pattern, self.method, self.backend)

    @property
    def weight(self) -> Pruning | None:
        """The settings of the weight gradient only, or None if it is exact."""
        return None if self.weight_grad is None else Pruning(*self.weight_grad, self.backend)

    @property
    def is_identity(self) -> bool:
        """Whether every value that enters the product stays (n == m). For a layer: the product of the data gradient."""
        return self.pattern.n == self.pattern.m

    def __str__(self) -> str:
        settings = f"pattern={self.pattern}, method={self.method}, backend={self.backend}"
        return settings if self.weight_grad is None else f"{settings}, weight_grad={self.weight_grad}"
