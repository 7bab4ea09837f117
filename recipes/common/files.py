# SPDX-License-Identifier: BSD-3-Clause
"""Reads and writes files. A crash, a kill or a full disk leaves either the old file or the complete new one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError


def printable(name: str) -> str:
    """A file's name with escapes for bytes that are not UTF-8, so that it can be printed, drawn and stored."""
    return name.encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file to write to. It replaces ``path`` after all of its content is on disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def append_line(path: Path, line: str) -> None:
    """Appends a line of JSON unless the file already contains it. An incomplete last line is removed first.

    Raises:
        OSError: if the line cannot be written. The file then has no part of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        with contextlib.suppress(OSError):  # some file systems have no locks; there, no two runs should end at once
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read()
        if line.encode() in whole.splitlines():
            return
        end, text = whole.rfind(b"\n") + 1, line.encode() + b"\n"
        if whole[end:] and not _is_cut_off(whole[end:]):  # an editor may have removed the final newline
            end, text = len(whole), b"\n" + text
        os.ftruncate(file.fileno(), end)
        try:
            if os.write(file.fileno(), text) < len(text):  # a single call, so that a kill cannot split the line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON objects, one per line. An incomplete last line is left out: ``append_line`` removes it.

    Raises:
        UserError: if the file is not readable or contains anything else.
    """
    try:
        whole = path.read_bytes()
        lines = whole.splitlines()
        if lines and not whole.endswith(b"\n") and _is_cut_off(lines[-1]):
            lines.pop()
        objects = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"expected a file of JSON lines, got {path}: {error}") from None
    if not all(isinstance(entry, dict) for entry in objects):
        raise UserError(f"expected a JSON object in each line, got other lines in {path}")
    return objects


def replace_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replaces what a file has between the lines ``begin`` and ``end``. Ends the program if it lacks one of them."""
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        sys.exit(f"report: expected {begin if not found else end} in {path}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def _is_cut_off(text: bytes) -> bool:
    """Whether the text is an incomplete JSON object."""
    try:
        json.loads(text)
    except ValueError:
        return text.startswith(b"{")
    return False


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable. Before the sync, the rename may exist only in memory."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
