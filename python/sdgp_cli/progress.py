# SPDX-License-Identifier: BSD-3-Clause
"""Shows the progress of a command on stderr: a bar if rich is installed and stderr is a terminal, else lines."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function. Call it with the name of each of the ``total`` steps when the step begins."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        with _bar(total) as begin:
            yield begin
        return
    begun = 0

    def begin_line(name: str) -> None:
        nonlocal begun
        begun += 1
        print(f"[{begun}/{total}] {name}", file=sys.stderr, flush=True)

    yield begin_line


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda name: bar.update(task, description=name, advance=1)
