"""What a browser would make of a report."""

import html.parser
import re
from pathlib import Path


class Page(html.parser.HTMLParser):
    """A page that is well formed and loads nothing: its tags and its text."""

    VOID = ("meta", "img", "br", "path", "use")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open, self.tags, self.text, self.html = [], [], "", file.read_text(encoding="utf-8")
        self.feed(self.html)
        assert self.open == []
        assert not re.search(r"url\((?!#)|@import|<script|<link", self.html)
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data"):
                assert value.startswith(("#", "data:image/")), value

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
