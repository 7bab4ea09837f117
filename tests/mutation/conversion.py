# SPDX-License-Identifier: BSD-3-Clause
"""Mutation testing of the conversion logic: `make mutants` runs it, pytest does not.

Each mutant is one small change of one module of the installed sdgp, made in memory, in a process of its own that is
forked once torch is imported; it is killed where a test fails. ``EQUIVALENT`` says of which no test could tell.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.machinery
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo  # slow; imported once, before the forks
from results import Mutant, Outcome, main

TESTS = Path(__file__).parents[1]
# The quickest that concern a module first: the first failure ends a run.
TESTS_OF = {
    "pattern": ["test_pattern.py"],
    "schedule": ["test_schedule.py"],
    "convert": ["test_convert.py", "test_advise.py", "test_schedule.py", "test_conv1d.py", "test_errors.py"],
    "modules": [
        "test_modules.py",
        "test_convert.py",
        "test_layers.py",
        "test_schedule.py",
        "test_conv1d.py",
        "test_watch.py",
        "test_errors.py",
    ],
}
SECONDS = 120  # a mutant that takes longer hangs, and is killed

EQUIVALENT = {
    "convert.py: module: '_Model'": "a TypeVar's name: type checkers alone read it",
    "modules.py: module: '_Module'": "a TypeVar's name: type checkers alone read it",
    "convert.py: module: '_sdgp_left_dense'": "the name of a private attribute, the same wherever it is used",
}

_COMPARISONS = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of ``node``."""
    other = copy.deepcopy(node)
    match other:
        case ast.Compare(ops=[operator, *rest]) if type(operator) in _COMPARISONS:
            other.ops = [_COMPARISONS[type(operator)](), *rest]
            yield other
            if rest:
                other = copy.deepcopy(node)
                other.ops[-1] = _COMPARISONS[type(rest[-1])]()
                yield other
        case ast.BoolOp():
            other.op = ast.And() if isinstance(other.op, ast.Or) else ast.Or()
            yield other
        case ast.UnaryOp(op=ast.Not()):
            yield other.operand
        case ast.BinOp() if type(other.op) in _OPERATORS:
            other.op = _OPERATORS[type(other.op)]()
            yield other
        case ast.Constant(value=bool()):
            yield ast.Constant(not other.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(other.value + 1)
        case ast.Constant(value=str()):
            yield ast.Constant(other.value + "X")
        case ast.IfExp() if isinstance(other.test, (ast.Name, ast.Call, ast.BoolOp)):
            yield ast.IfExp(ast.UnaryOp(ast.Not(), other.test), other.body, other.orelse)
        case ast.If() if isinstance(other.test, (ast.Name, ast.Call, ast.BoolOp)):  # a comparison has its own
            other.test = ast.UnaryOp(ast.Not(), other.test)
            yield other
        case ast.Return(value=ast.expr()) if not (isinstance(other.value, ast.Constant) and other.value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Tuple()]):
            yield ast.Pass()
        case ast.Continue():
            yield ast.Break()


def _places(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every place for a change, as parent, field and index; not docstrings, annotations, imports and bare values."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        parent = waiting.pop(0)
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "type_comment") or isinstance(parent, (ast.Import, ast.ImportFrom)):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                if isinstance(child, ast.AST) and not is_docstring and not is_for_types:
                    yield parent, field, index
                    waiting.append(child)


def _get(parent: ast.AST, field: str, index: int | None) -> ast.AST:
    value = getattr(parent, field)
    return value if index is None else value[index]


def _set(parent: ast.AST, field: str, index: int | None, child: ast.AST) -> None:
    if index is None:
        setattr(parent, field, child)
    else:
        getattr(parent, field)[index] = child


def mutants() -> Iterator[Mutant]:
    package = Path((importlib.util.find_spec("sdgp").submodule_search_locations or [""])[0])  # type: ignore[union-attr]
    for module in TESTS_OF:
        tree = ast.parse((package / f"{module}.py").read_text())
        for place in list(_places(tree)):
            original = _get(*place)
            for change in _changes(original):
                _set(*place, change)
                mutated = ast.unparse(ast.fix_missing_locations(tree))
                _set(*place, original)
                shown = [ast.unparse(x).splitlines()[0] for x in (original, change)]
                function = _function_at(tree, getattr(original, "lineno", 0))
                yield Mutant(f"{module}.py", original.lineno, f"{function}: {shown[0]} -> {shown[1]}", mutated)


def _function_at(tree: ast.Module, line: int) -> str:
    inside = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return ".".join(inside) or "module"


def judge(mutant: Mutant) -> Outcome:
    """Runs the tests of the module in a fork; of all modules where no source is given."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)  # ends the process
        try:
            status = _run_tests(mutant)
        except BaseException:
            status = 1
        os._exit(status)
    _, status = os.waitpid(child, 0)
    return "survived" if status == 0 else "killed"


def _run_tests(mutant: Mutant) -> int:
    module = mutant.file.removesuffix(".py")
    get_code = importlib.machinery.SourceFileLoader.get_code

    def mutated(loader: importlib.machinery.SourceFileLoader, name: str) -> object:
        if mutant.source and name == f"sdgp.{module}":
            return compile(mutant.source, loader.get_filename(name), "exec")
        return get_code(loader, name)

    importlib.machinery.SourceFileLoader.get_code = mutated  # type: ignore[method-assign, assignment]
    torch.set_num_threads(1)
    names = TESTS_OF.get(module) or sorted({name for names in TESTS_OF.values() for name in names})
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return int(any(pytest.main([*options, f"--rootdir={TESTS.parent}", str(TESTS / name)]) for name in names))


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main("conversion", mutants(), judge, EQUIVALENT)
