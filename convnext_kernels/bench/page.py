"""The reports as HTML pages, a file each; jinja2 and matplotlib are imported only where one is written."""

import datetime
import importlib.util
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from convnext_kernels.bench.results import write_atomically
from convnext_kernels.bench.tables import Table, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Section(NamedTuple):
    """A part of a page: texts, tables, and lists of (caption, figure). A section without parts is left out."""

    title: str
    parts: "Sequence[str | Table | list[tuple[str, Figure]]]"


def missing() -> str:
    """Why no report can be written here, and how to change that; "" if one can."""
    names = " and ".join(name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None)
    return f'the report needs {names}, which is not installed: pip install "convnext-kernels[bench]"' if names else ""


def svg(figure: "Figure") -> str:
    """Return the figure as an inline ``<svg>`` element with real text, without prolog, metadata or a fixed size."""
    from matplotlib import rc_context

    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    found = text.getvalue()
    found = re.sub(r'<g id="[^"]*"', "<g", found[found.index("<svg") :])  # ids must not repeat in a page
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 width="100%"', found, count=1)


def date(created: str | None = None) -> str:
    """A moment (ISO 8601), or now, for a reader."""
    moment = datetime.datetime.fromisoformat(created) if created else datetime.datetime.now().astimezone()
    return moment.strftime("%Y-%m-%d %H:%M %Z").strip()


def write(
    file: Path,
    title: str,
    about: str,
    sections: Sequence[Section],
    warnings: Sequence[str] = (),
    failures: Sequence[str] = (),
) -> None:
    """Write a page to `file`; OSError if that fails. `about` is a line below the title; texts are escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("convnext_kernels.bench"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    values = {"title": title, "about": about, "sections": sections, "warnings": warnings, "failures": failures}
    text = environment.get_template("page.html.jinja").render(**values, look=look, svg=svg)
    write_atomically(file, text)
