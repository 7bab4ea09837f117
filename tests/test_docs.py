# SPDX-License-Identifier: BSD-3-Clause
"""Tests the documentation: its Python runs, its commands and C++ name only things that exist, and the site builds.

Each Python block runs as its own program, as a reader would paste it, because libraries keep state for a whole process.
"""

from __future__ import annotations

import ast
import doctest
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import sdgp

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md", "recipes/worth/README.md")
]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build", "data", "dist", "runs"}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    return [Block(name, text[: found.start()].count("\n") + 1, *found.groups()) for found in FENCE.finditer(text)]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def written_in(*languages: str) -> pytest.MarkDecorator:
    blocks = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", blocks, ids=[f"{block.page}:{block.line}" for block in blocks])


@written_in("python")
def test_python(block: Block, tmp_path: Path) -> None:
    for library in _imports(block.code):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    program = tmp_path / "block.py"
    program.write_text(block.code)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    by_torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher = by_torchrun if block.code.startswith("# torchrun ") else []
    run = subprocess.run(
        [sys.executable, *launcher, program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def _imports(code: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(code)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    drawn = {"matplotlib"} if "sdgp.plot(" in code else set()
    return {name.split(".")[0] for name in names} - {"sdgp", "torch"} | drawn


@written_in("bash")
def test_commands(block: Block) -> None:
    assert [missing for line in block.code.splitlines() for missing in missing_in(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_text(page: Path) -> None:
    spans = re.findall(
        r"`((?:make|python|cmake|pip|pytest|torchrun|[A-Z_]+=\S+) [^`]+)`", FENCE.sub("", page.read_text())
    )
    assert [missing for span in spans for missing in missing_in(span)] == []


def missing_in(command: str) -> list[str]:
    """Lists the targets, options, modules and files that a command line names but that do not exist."""
    command = command.split(" #")[0]
    checks: list[tuple[str, Callable[[str], bool]]] = [
        (r"(?:^|[;&|(]\s*)make ([a-z][\w-]*)", _is_target),
        (r"-D\s?(\w+)=|cmake\.define\.(\w+)=", _is_cmake_option),
        (r"(?<!\S)-m ([a-z_][\w.]*[\w])(?!\S)", _is_module),
        (rf"(?<![\w/.$-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]+)", _is_path),
    ]
    found = [(name, exists) for pattern, exists in checks for name in _named(pattern, command)]
    return [f"{name}, in {command.strip()}" for name, exists in found if not exists(name)]


def _named(pattern: str, command: str) -> list[str]:
    return [next(filter(None, match.groups())) for match in re.finditer(pattern, command)]


def _is_target(name: str) -> bool:
    return re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None


def _is_cmake_option(name: str) -> bool:
    if name in ("CMAKE_PREFIX_PATH", "CMAKE_CUDA_ARCHITECTURES", "CMAKE_BUILD_TYPE"):
        return True
    lists = [ROOT / "CMakeLists.txt", *(ROOT / "examples").rglob("CMakeLists.txt")]
    return any(re.search(rf"(?:option|set)\({name}\s", path.read_text()) for path in lists)


def _is_module(name: str) -> bool:
    if name in ("slow", "cuda"):  # markers for pytest's -m
        return True
    path = ROOT.joinpath(*name.split("."))
    parent = ROOT / "python" / Path(*name.split("."))
    here = [path.with_suffix(".py"), path / "__init__.py", parent.with_suffix(".py"), parent / "__init__.py"]
    return any(map(Path.is_file, here)) or (name.split(".")[0] not in FOLDERS | {"sdgp"} and _is_installed(name))


def _is_installed(name: str) -> bool:
    return name in ("build", "pip", "venv") or find_spec(name.split(".")[0]) is not None


def _is_path(name: str) -> bool:
    return name.startswith("build/") or (ROOT / name).exists()


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("make nothing", "nothing"),
        ("python -m recipes.nothing", "recipes.nothing"),
        ("python benchmarks/nothing.py", "benchmarks/nothing.py"),
        ("pip install . -C cmake.define.SDGP_NOTHING=ON", "SDGP_NOTHING"),
        ("make demo && python -m recipes.report && cmake -DSDGP_TESTS=ON -S examples/cpp", None),
    ],
)
def test_what_is_missing_is_found(command: str, missing: str | None) -> None:
    assert missing_in(command) == ([] if missing is None else [f"{missing}, in {command}"])


@written_in("cpp")
def test_cpp(block: Block) -> None:
    assert any(block.code in path.read_text() for path in (ROOT / "examples/cpp").rglob("*.cpp"))


@written_in("cmake")
def test_cmake(block: Block) -> None:
    examples = (ROOT / "examples/cpp/CMakeLists.txt").read_text()
    examples = examples.replace("sdgp_examples", "app").replace("${example}", "app")
    known = {line.strip() for line in examples.splitlines()}
    assert set(block.code.splitlines()) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_tested(page: Path) -> None:
    """Every block must have a known language, or nothing tests it. "text" marks formulas and output."""
    assert {block.language for block in blocks_of(page)} <= {"python", "bash", "cpp", "cmake", "text"}
    rest = FENCE.sub("", page.read_text())
    assert "```" not in rest
    assert not re.search(r"\n\n(?: {4}|\t)(?!options:)\S", rest), "an indented block, which has no language"


def modules_of_sdgp() -> list[str]:
    """Lists all modules of sdgp, including private modules, because sdgp offers their public names."""
    found = pkgutil.walk_packages(sdgp.__path__, "sdgp.")
    return [name for _, name, _ in found if not name.endswith(("_C", "__main__"))]


@pytest.mark.parametrize("name", modules_of_sdgp())
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip(name, exc_type=ModuleNotFoundError)
    if name == "sdgp._plot":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # examples write files here
    assert doctest.testmod(module, extraglobs={"sdgp": sdgp, "torch": torch}).failed == 0
    assert not re.search(
        r":(func|class|mod|math|meth):`|^ *\.\. ", Path(str(module.__file__)).read_text(), re.MULTILINE
    )


@pytest.mark.parametrize("name", [name for name in sdgp.__all__ if callable(getattr(sdgp, name))])
def test_public_names_have_an_example(name: str) -> None:
    assert ">>> " in (getattr(sdgp, name).__doc__ or "")


def test_api_page_is_complete() -> None:
    listed = re.findall(r"^::: sdgp\.(?:\w+\.)?(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert set(sdgp.__all__) - {"__version__", "chooser", "cmake_prefix_path"} <= set(listed)


def test_site() -> None:
    """The site must build in strict mode, which fails on broken links and anchors."""
    for library in ("zensical", "mkdocstrings_handlers.python", "matplotlib"):
        pytest.importorskip(library)
    subprocess.run([sys.executable, ROOT / "docs/pages.py"], check=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    site = ROOT / "build/site"
    pages = {path.name: path.read_text() for path in site.glob("*.html")}
    assert {"index.html", "recipes.html", "changelog.html", "contributing.html"} <= set(pages)
    menu = {f"{name}.html" for name in re.findall(r'"(\w+)\.md"', (ROOT / "zensical.toml").read_text())}
    assert set(pages) == menu | {"404.html"}
    assert len(list((site / "plots").glob("*.svg"))) >= len(list((ROOT / "benchmarks/results").glob("*.json")))
    for name, page in pages.items():
        assert not re.search(r"<(?:script|img|iframe)[^>]*src=\"?(?:https?:)?//|<link[^>]*stylesheet[^>]*//", page), (
            name
        )
