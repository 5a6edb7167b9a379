"""Hooks of `mkdocs build`: add pages from outside docs/, and translate links between files."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
INDEX = "README.md"  # the site's first page
# Files outside docs/ that pages may link to. The build fails on a link to any other file.
BESIDES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "bench/RESULTS.md",
    "bench/results/speed.svg",
    "configs/every-option.yaml",
    "tracmod/kernels/reference.py",
)
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the first page, and the files beside docs/ under repository/."""
    for path in (INDEX, *BESIDES):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Translate links between files of the repository to links between pages of the site."""
    here = repository_path(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[2]))
        start = posixpath.dirname(page.file.src_uri) or "."
        return link[1] + posixpath.relpath(site_path(target), start)

    return LINK.sub(moved, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Show examples in command help as preformatted text, and remove placeholder defaults."""
    if page.file.src_uri != "cli.md":
        return html
    html = re.sub(r"<p>(Examples?:)\n(.*?)</p>", r"<p>\1</p>\n<pre>\2</pre>", html, flags=re.DOTALL)
    html = re.sub(r"<p>([^<]*\w   [^<]*)</p>", r"<pre>\1</pre>", html)
    return html.replace("<code>Sentinel.UNSET</code>", "")  # click's placeholder for no default


def site_path(path: str) -> str:
    """Return the path in the site of a file of the repository."""
    if path == INDEX:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def repository_path(uri: str) -> str:
    """Return the path in the repository of a file of the site: the inverse of `site_path`."""
    if uri == "index.md":
        return INDEX
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"
