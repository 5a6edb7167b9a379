"""A parser of HTML pages for tests: their tags, scripts and text."""

import base64
import gzip
import json
from html.parser import HTMLParser

VOID = {"meta", "br", "input", "link", "img", "hr"}


class Page(HTMLParser):
    """An HTML page or part of one, parsed; tags that do not match raise AssertionError.

    Attributes:
        tags: Every tag with its attributes, in order.
        scripts: The attributes and the content of every script element.
        texts: (innermost tag, stripped text) of every text outside scripts, in order.
        text: All text outside scripts.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.tags[-1][1], data))
            return
        self.text += data
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def json(self, name: str) -> list | dict:
        """Return the unpacked content of a script element."""
        data = next(data for attrs, data in self.scripts if attrs.get("id") == name)
        return json.loads(gzip.decompress(base64.b64decode(data)))
