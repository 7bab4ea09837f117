# SPDX-License-Identifier: BSD-3-Clause
"""TOML files and ``--set key=value`` to a frozen dataclass; a key or a type it does not know is an error."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["difference", "load", "tomllib"]

_Config = TypeVar("_Config")


def load(cls: type[_Config], files: Iterable[Path], overrides: Iterable[str] = ()) -> _Config:
    """The defaults of ``cls``, then the files in order, then ``key=value`` overrides, each over what came before.

    Raises:
        UserError: an unreadable file, an unknown key, a value of another type than the field's.

    Example:
        >>> load(Config, [Path("configs/mvue_2_4.toml")], ["epochs=5", "net=small"])
    """
    values: dict[str, Any] = {}
    for file in files:
        values |= _checked(cls, _read(file), str(file))
    for override in overrides:
        values |= _checked(cls, _parse(override), f"--set {override}")
    return cls(**values)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What two configs differ in: ``lr: 0.1 -> 0.2, epochs: 5 -> 6``; "" where they are equal."""
    missing = "(none)"
    pairs = ((key, old.get(key, missing), new.get(key, missing)) for key in {**old, **new})
    return ", ".join(f"{key}: {before} -> {after}" for key, before, after in pairs if before != after)


def _read(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text())
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
    except tomllib.TOMLDecodeError:  # a string needs no quotes here
        return {key.strip(): value.strip()}


def _checked(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    types = get_type_hints(cls)
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
    if get_origin(wanted) is Literal:
        if value in get_args(wanted):
            return value
        raise UserError(f"config: expected {key} to be one of {', '.join(get_args(wanted))}, got {value!r} ({source})")
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise UserError(f"config: expected {key} to be {wanted.__name__}, got {value!r} ({source})")
    return value
