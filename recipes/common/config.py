# SPDX-License-Identifier: BSD-3-Clause
"""Reads TOML files and ``--set key=value`` into a frozen dataclass. Unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from .errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Count", "Natural", "NonNegative", "Share", "difference", "load", "tomllib"]

_Config = TypeVar("_Config")


# Types with the least and the largest value of a setting.
Count: TypeAlias = Annotated[int, 1, math.inf]
Natural: TypeAlias = Annotated[int, 0, math.inf]
NonNegative: TypeAlias = Annotated[float, 0, math.inf]
Share: TypeAlias = Annotated[float, 0, 1]


def load(cls: type[_Config], files: Iterable[Path], overrides: Iterable[str] = ()) -> _Config:
    """Creates a config from the defaults of ``cls``, the files and the ``key=value`` overrides. Later values win.

    Raises:
        UserError: if a file is not readable, a key is unknown, or a value does not have the type of the field.

    Examples:
        >>> load(Config, [Path("recipes/pruning/mvue_2_4.toml")], ["epochs=5", "net=vit"])
    """
    values: dict[str, Any] = {}
    for file in files:
        values |= _checked(cls, _read(file), str(file))
    for override in overrides:
        values |= _checked(cls, _parse(override), f"--set {override}")
    return cls(**values)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Describes how two configs differ: ``lr: 0.1 -> 0.2, epochs: 5 -> 6``. Returns "" if they are equal."""
    missing = "(none)"
    pairs = ((key, old.get(key, missing), new.get(key, missing)) for key in {**old, **new})
    return ", ".join(f"{key}: {before} -> {after}" for key, before, after in pairs if before != after)


def _read(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        return values
    except OSError as error:
        raise UserError(f"config: expected a TOML file, got {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config: expected TOML, got {file}: {error}") from None


def _parse(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"--set: expected key=value, got {override!r}")
    try:
        return {key.strip(): tomllib.loads(f"value = {value}")["value"]}
    except tomllib.TOMLDecodeError:  # strings need no quotes on the command line
        return {key.strip(): value.strip()}


def _checked(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    types = get_type_hints(cls, include_extras=True)
    known = [field.name for field in dataclasses.fields(cls)]
    result = {}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"config: expected one of {', '.join(known)}, got {key!r} ({source}){hint}")
        result[key] = _typed(key, value, types[key], source)
    return result


def _typed(key: str, value: Any, wanted: Any, source: str) -> Any:
    least, most = -math.inf, math.inf
    if get_origin(wanted) is Annotated:
        wanted, least, most = get_args(wanted)
    if get_origin(wanted) is Literal:
        if value in get_args(wanted):
            return value
        raise UserError(f"config: expected {key} to be one of {', '.join(get_args(wanted))}, got {value!r} ({source})")
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UserError(f"config: expected {key} to be {wanted.__name__}, got {value!r} ({source})")
    if wanted is float and not math.isfinite(value):
        raise UserError(f"config: expected {key} to be finite, got {value} ({source})")
    if wanted in (int, float) and not least <= value <= most:
        wanted_range = f"{key} >= {least}" if most == math.inf else f"{least} <= {key} <= {most}"
        raise UserError(f"config: expected {wanted_range}, got {value} ({source})")
    return value
