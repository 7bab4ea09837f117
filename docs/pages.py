# SPDX-License-Identifier: BSD-3-Clause
"""Writes the pages of the documentation site to build/pages, from which `make docs` builds the site.

It adds pages from outside docs/ and the plots of the stored results. Links in the sources hold in the repository. On
the site, a link to another page leads to that page, and a link to any other file leads to a copy of that file.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import plot  # noqa: E402, a program beside its results, no package

PAGES = {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")} | {
    "recipes/README.md": "recipes.md",
    "recipes/worth/README.md": "worth.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "requirements/licences.md": "licences.md",
}
PLOTS = "<!-- plots -->"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def write(folder: Path) -> None:
    """Writes all pages, and what they show or link to, to a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "docs/wide.css", folder)
    plots = "\n\n".join(f"![{Path(name).stem}]({name})" for name in draw_plots(folder))
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = LINK.sub(lambda link: translate(link, posixpath.dirname(source), folder), text)  # noqa: B023
        (folder / page).write_text(text.replace(PLOTS, plots), encoding="utf-8")


def translate(link: re.Match[str], source: str, folder: Path) -> str:
    """Returns a link of a source, in a folder of the repository, as it must be on the site."""
    image, text, target, anchor = link.groups()
    path = posixpath.normpath(posixpath.join(source, target))
    if (ROOT / path).is_dir():
        return text  # a folder has no page
    page = {**PAGES, "README.md": "index.md"}.get(path)
    if page is None and (ROOT / path).is_file():
        page = f"files/{path}"
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / page)
    return f"{image}[{text}]({page or target}{anchor or ''})"


def draw_plots(folder: Path) -> list[str]:
    """Draws the plots of the stored results. Returns their paths in the folder."""
    (folder / "plots").mkdir()
    names = []
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        for subject in plot.plots_of(results):
            names.append(f"plots/{path.stem}-{subject}.svg")
            plot.draw(results, [subject]).savefig(folder / names[-1])
    return sorted(names)


if __name__ == "__main__":
    write(ROOT / "build/pages")
