"""Makes pictures of a report for the docs: `python tests/support/report_picture.py RUN FOLDER`.

Writes report.png (summary and heat maps) and examples.png (a test example and its strongest
training examples).
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDTH = 1200
# Styles that hide the parts of the page that a picture does not show.
REPORT = """
nav, .pair, #summary ~ section:not(#influence), .findings li:nth-child(n+4), .compare,
#influence .plots ~ h3, #influence .plots ~ .plots { display: none !important; }
.page { display: block !important; } header { padding-top: 1.5rem !important; }
"""
EXAMPLES = """
nav, header, main > section:not(#examples), .choices li:nth-child(n+5),
.listed tbody tr:nth-child(n+4) { display: none !important; }
.page { display: block !important; } #examples { padding-top: 1.5rem; border: 0; margin: 0; }
"""


def _open(page: Page, path: Path, style: str) -> None:
    page.goto(path.as_uri())
    page.add_style_tag(content=style)


def _draw(page: Page, path: Path) -> None:
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").quantize(255).save(path, optimize=True)  # saves two thirds


def main(run: Path, folder: Path) -> None:
    """Draw both pictures of the report of `run` into `folder`."""
    path = (run / "report" / "index.html").resolve()
    with sync_playwright() as api:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = api.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        _open(page, path, REPORT)
        page.locator("#influence").scroll_into_view_if_needed()
        page.wait_for_selector("#influence .plot[data-drawn] .heatmaplayer image")
        page.wait_for_timeout(1000)
        _draw(page, folder / "report.png")
        _open(page, path, EXAMPLES)
        page.wait_for_selector("#examples[data-ready]", state="attached")
        _draw(page, folder / "examples.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
