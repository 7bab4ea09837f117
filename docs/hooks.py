# SPDX-License-Identifier: BSD-3-Clause
"""What mkdocs cannot do by itself: pages from outside docs/, links to the repository's files, plots drawn from results.

Links in the pages are those that hold in the repository. On the site, those to another page lead to that page, and
those to any other file to a copy of it.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import plot  # noqa: E402, a program beside its results, no package

ELSEWHERE = {
    "recipes/README.md": "recipes.md",
    "recipes/worth/README.md": "worth.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "requirements/licences.md": "licences.md",
}
PAGE_OF = {**ELSEWHERE, "README.md": "index.md"}
PLOTS = "<!-- plots -->"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name, picture in _draw_plots().items():
        files.append(File.generated(config, name, content=picture))
    for page in list(files.documentation_pages()):
        for *_, target, _ in LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, target)
            if (ROOT / path).is_file() and (copy := _on_site(path)).startswith("files/") and copy not in files.src_uris:
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    def translate(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups()
        path = _in_repository(page.file.src_uri, target)
        if (ROOT / path).is_dir():
            return text  # a folder has no page
        return f"{image}[{text}]({_on_site(path)}{anchor or ''})"

    pictures = [name for name in sorted(files.src_uris) if name.startswith("plots/")]
    plots = "\n\n".join(f"![{Path(name).stem}]({name})" for name in pictures)
    return LINK.sub(translate, markdown).replace(PLOTS, plots)


def _in_repository(page: str, target: str) -> str:
    """The path in the repository that a page of the site, written elsewhere, names."""
    source = {on_site: path for path, on_site in ELSEWHERE.items()}.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _on_site(path: str) -> str:
    """Where the site, whose pages all lie at its top, has a file of the repository; what does not exist stays."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGE_OF.get(path, f"files/{path}" if (ROOT / path).is_file() else path)


def _draw_plots() -> dict[str, bytes]:
    """Drawn from the stored results at each build, so that no picture is older than the numbers."""
    pictures = {}
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        results = json.loads(path.read_text())
        for subject in plot.plots_of(results):
            picture = io.BytesIO()
            plot.draw(results, [subject]).savefig(picture, format="svg")
            pictures[f"plots/{path.stem}-{subject}.svg"] = picture.getvalue()
    return pictures
