"""What mkdocs.yml cannot say: pages from outside docs/, links to source files, and lists as GitHub reads them."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository that are pages of the site, and where.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/tour.ipynb": "tour.md",
    "proofs/README.md": "proofs.md",
    "proofs/records/cuda_counts.md": "records/cuda_counts.md",
    "proofs/records/cuda_kernels.md": "records/cuda_kernels.md",
    "proofs/records/triton_counts.md": "records/triton_counts.md",
    "proofs/records/triton_kernels.md": "records/triton_kernels.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
ITEM = re.compile(r"( *)((?:[-*]|\d+\.) +)(.*)")


def notebook(text: str) -> str:
    """The cells of a notebook and what they printed and drew, as Markdown."""
    lines = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        lines += [source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```", ""]
        outputs = cell.get("outputs", [])
        printed = "".join("".join(output.get("text", "")) for output in outputs).rstrip()
        lines += [f"```text\n{printed}\n```", ""] if printed else []
        drawn = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        lines += [f"![plot](data:image/png;base64,{''.join(image).strip()})\n" for image in drawn]
    return "\n".join(lines)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    from mkdocs.structure.files import File  # here, so that the tests need no mkdocs

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        content = notebook(text) if source.endswith(".ipynb") else text
        files.append(File.generated(config, page, content=content))
    return files


def lists(text: str) -> str:
    """Indent list items by four spaces a level and part them from a paragraph before them.

    GitHub reads items that are indented by two; Python's Markdown needs four and an empty line.
    """
    out, columns, fenced = [], [], False
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        item = None if fenced else ITEM.fullmatch(line)
        if line.strip() and not fenced and (item or not out or not out[-1].strip()):
            while columns and indent < columns[-1]:
                columns.pop()
        level = len(columns)
        if item:
            if not level and out and out[-1].strip() and not in_list(out[-1]):
                out.append("")
            columns.append(indent + len(item[2]))
            line = item[2] + item[3]
        elif columns:
            line = line[min(indent, columns[-1]) :]
        out.append(" " * 4 * level + line if line.strip() else "")
        if line.lstrip().startswith("```"):
            fenced = not fenced
    return "\n".join(out)


def in_list(line: str) -> bool:
    """Whether a line that `lists` has written is an item or belongs to one."""
    return line.startswith("    ") or ITEM.fullmatch(line) is not None


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links of the site or, outside of it, of the repository."""
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(found: re.Match) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists() or (path.startswith("docs/") and source.startswith("docs/")):
            return found[0]
        inside = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if inside is not None:
            return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})" if config.repo_url else text

    return LINK.sub(link, lists(markdown))
