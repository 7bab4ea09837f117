# SPDX-License-Identifier: BSD-3-Clause
"""Builds the model that the argument of ``sdgp profile`` names: from torchvision, timm, or the caller's own code.

Nothing is downloaded, and only the code of these libraries and the code that the caller names runs.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.machinery
import importlib.util
import inspect
import operator
import sys
import traceback
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from . import CommandError

_Make = Callable[[str], Any]


def build(name: str) -> tuple[nn.Module, Any]:
    """Returns the model, and the batch that the caller's code returned with it, or None."""
    zoo, colon, model = name.partition(":")
    if colon and zoo not in _ZOOS:
        source, _, function = name.rpartition(":")  # a path may contain colons
        return _call(name, _find(_import(source), source, function))
    zoos, model = ([zoo], model) if colon else (list(_ZOOS), name)
    return _call(name, partial(_find_in_zoos(zoos, model), model))


def describe_error(error: BaseException) -> str:
    """Returns the type, the first line and the location of an error that another library or the caller raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first} ({frame.filename}:{frame.lineno})"


def _call(name: str, make: Callable[[], Any]) -> tuple[nn.Module, Any]:
    try:
        made = make()
    except (Exception, SystemExit) as error:
        raise CommandError(f"expected {name} to return a model, got {describe_error(error)}") from error
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise CommandError(f"expected {name} to return an nn.Module or (nn.Module, batch), got {type(made).__name__}")
    return model, batch


# Models from the caller's code.


def _import(source: str) -> ModuleType:
    is_file = source.lower().endswith(".py")
    if is_file and not Path(source).is_file():
        raise CommandError(f"expected a file, got {source!r}")
    sys.path.insert(0, str(Path(source).resolve().parent if is_file else Path.cwd()))  # as `python` itself does
    try:
        return _import_file(Path(source)) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (source, source.partition(".")[0]):
            raise CommandError(
                f"expected torchvision, timm, a module or a file before the colon, got {source!r}"
            ) from error
        raise CommandError(f"expected {source} to import, got {describe_error(error)}") from error


def _import_file(path: Path) -> ModuleType:
    name = f"_profiled_{path.stem}"  # the bare stem may be the name of a library
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _find(module: ModuleType, source: str, name: str) -> Callable[[], Any]:
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError as error:
        known = [key for key, value in vars(module).items() if callable(value)]
        raise CommandError(f"expected a function or class of {source}, got {name!r}{_suggest(name, known)}") from error
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise CommandError(f"expected a function or class of {source}, got {name!r}, a {type(found).__name__}")
    make: Callable[[], Any] = found
    return make


# Models from the libraries.


def _find_in_zoos(zoos: Collection[str], name: str) -> _Make:
    installed = [zoo for zoo in zoos if importlib.util.find_spec(zoo) is not None]
    if not installed:
        raise CommandError(f"expected {' or '.join(zoos)} to be installed for a model's name, got none: pip install it")
    known: list[str] = []
    for zoo in installed:
        try:
            names, make = _ZOOS[zoo]()
        except Exception as error:  # for example if torchvision was built for another torch
            raise CommandError(f"expected {zoo} to import, got {describe_error(error)}") from error
        if name.partition(".")[0] in names:  # timm names may end with a tag for the weights
            return make
        known += names
    raise CommandError(
        f"expected a model that {' or '.join(installed)} knows, or path/to/file.py:function, "
        f"got {name!r}{_suggest(name, known)}"
    )


def _torchvision() -> tuple[list[str], _Make]:
    from torchvision import models

    def make(name: str) -> Any:
        builder = models.get_model_builder(name)
        # By default, detection and segmentation models download the weights of their backbones.
        weights = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
        return builder(**weights)

    return models.list_models(), make


def _timm() -> tuple[list[str], _Make]:
    import timm

    return timm.list_models(), lambda name: timm.create_model(name, pretrained=False)


_ZOOS: dict[str, Callable[[], tuple[list[str], _Make]]] = {"torchvision": _torchvision, "timm": _timm}


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)))
    return f"; did you mean {', '.join(close)}?" if close else ""
