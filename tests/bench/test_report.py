import html
import html.parser
import math
import re
import sys

import pytest

from convnext_kernels.bench import report
from convnext_kernels.bench.charts import number, short
from convnext_kernels.bench.results import EAGER, OURS, UNAVAILABLE, Check
from tests.bench import runs

BLOCK = "block/V1-C96-56x56-b1-fp32-forward"


class Page(html.parser.HTMLParser):
    """What a browser would load, which tags stay open, and the text."""

    VOID = ("meta", "img", "br", "path", "use")

    def __init__(self, text):
        super().__init__()
        self.resources, self.open, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.resources += [v for n, v in attributes if n in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def write(tmp_path):
    """Write a report to a new folder; returns (text of the HTML, its Page, names of the PNG files)."""

    def call(run):
        first, *pictures = report.write(run, tmp_path / "new" / "folder")
        assert first == tmp_path / "new" / "folder" / "report.html"
        for picture in pictures:
            assert picture.parent == first.parent
            assert picture.read_bytes().startswith(b"\x89PNG")
        text = first.read_text(encoding="utf-8")
        page = Page(text)
        assert page.open == []
        assert all(value.startswith("#") for value in page.resources)
        assert not re.search(r"url\((?!#)|@import|<script|<link|<img", text)
        return text, page, [picture.name for picture in pictures]

    return call


def small(run, *words):
    """`run` with the cases that have one of `words` in their names."""
    run.records = [r for r in run.records if any(word in r.case for word in words)]
    return run


def row(text, case, candidate):
    """The text of a row of the table of everything."""
    table = text[text.index("<h2>All results") :]
    part = table[table.index(f">{case}<") :]
    line = next(x for x in part.split("<tr")[1:] if candidate in x)
    return html.unescape(re.sub(r"<[^>]+>", " ", line[: line.index("</tr>")]))


def test_full_run(write):
    run = runs.full_run()
    _, page, names = write(run)
    groups = ("layernorm", "dwconv", "dwconv3d", "mlp", "block", "model")
    assert names == [*(f"ratios-{group}.png" for group in groups), "models.png", "scaling.png", "roofline.png"]
    for name in run.cases():
        assert name in page.text
    for words in ("Example Xeon 6", "device cpu", "mode full", "2026-11-24 20:01", "0123456789ab", "complete"):
        assert words in page.text
    assert "interrupted" not in page.text
    assert "Wrong or failed" not in page.text
    assert "no bf16 kernels for CPUs" in page.text
    assert "LayerNorm has 0 FLOPs" in page.text
    for candidate in {record.candidate for record in run.records}:
        assert candidate in page.text


def test_cuda_run(write):
    run = small(runs.full_run("cuda"), "K7-C384", "block/V1", "ConvNeXt-T", "ResNet")
    _, page, names = write(run)
    assert "Example H100" in page.text
    assert "L2 cache is flushed" in page.text
    assert "launches" in page.text
    assert {"models.png", "roofline.png"} <= set(names)


def test_what_is_wrong_or_failed_is_shown_and_has_no_speed(write):
    text, page, _ = write(small(runs.odd_run(), "C96-56x56", "C768-7x7", "ResNet"))
    assert "interrupted" in page.text
    assert "other processes use 34%" in page.text
    assert "threads are <not> pinned & drift" in page.text
    assert "Wrong or failed: 4 of" in page.text
    wrong = row(text, BLOCK, OURS)
    assert "wrong: error 3.2e-01 against fp64 exceeds the allowed" in wrong
    assert ">100" in wrong
    assert "±" not in wrong
    assert "NaN" in row(text, "block/V2-C96-56x56-b8-bf16-forward", "torch.compile")
    failed = row(text, "dwconv/K31-C768-7x7-b8-bf16-forward", OURS)
    assert "failed: RuntimeError: <script>alert('x')</script> & more" in failed


def test_cases_in_which_ours_is_slower_are_listed(write):
    run = small(runs.full_run(), "block/V1-C96-56x56-b1", "block/V1-C96-56x56-b8")
    case = run.cases()[BLOCK]
    best = min(r.times.median for name, r in case.items() if r.times and name != OURS)
    run = runs.replace(run, BLOCK, OURS, times=runs.times(1.25 * best))
    text, page, _ = write(run)
    section = text[text.index("<h2>Cases slower than") : text.index("<h2>Speed-up of every case")]
    assert BLOCK in section
    assert report.summarise([run.cases()[BLOCK]]).slower_than_peer == 1
    assert re.search(r"1\.\d\dx slower \(1\.\d\d to 1\.\d\d\)", section)
    assert "slower than the best peer in " in page.text
    assert not re.search(r"\b0\.\d+x", page.text)  # a loss is written as "slower"


def test_nothing_slower_says_so(write):
    run = small(runs.full_run(), BLOCK)
    _, page, _ = write(runs.replace(run, BLOCK, OURS, times=runs.times(1e-6)))
    assert "None: no candidate of any case" in page.text


def test_empty_run(write):
    text, page, names = write(runs.full_run(records=[], complete=False, ceilings={}, conditions={}))
    assert names == []
    assert "This run has no records" in page.text
    assert "interrupted" in page.text
    assert "No ceilings were measured" in page.text
    assert "<svg" not in text


def test_only_rivals(write):
    _, page, names = write(small(runs.full_run(), "rival/"))
    assert names == ["models.png"]
    assert "No case has times of both" in page.text


def test_only_layernorm_has_no_roofline(write):
    _, page, names = write(small(runs.full_run(), "layernorm/"))
    assert names == ["ratios-layernorm.png"]
    assert "Roofline" not in page.text


@pytest.mark.parametrize(
    "ceilings", [{}, {"flops": {}}, {"memory": runs.CEILINGS["memory"]}, {"flops": {"fp32": 1e11}}]
)
def test_missing_ceilings(write, ceilings):
    _, page, names = write(small(runs.full_run(ceilings=ceilings), "block/V1"))
    assert "roofline.png" in names
    assert ("No ceilings were measured" in page.text) == (not any(ceilings.values()))


def test_a_case_without_eager_or_without_any_peer(write):
    run = small(runs.full_run(), "block/V1-C96-56x56-b1-fp32", "block/V1-C96-56x56-b1-bf16")
    gone = {"status": UNAVAILABLE, "reason": "needs <100> GiB", "times": None}
    alone = runs.replace(run, BLOCK, EAGER, **gone)
    _, page, _ = write(alone)
    assert "needs <100> GiB" in page.text
    for candidate in {record.candidate for record in run.records} - {OURS, EAGER}:
        alone = runs.replace(alone, BLOCK, candidate, **gone)
    _, page, _ = write(alone)
    assert "no peer" in page.text


def test_checks_of_verify(write):
    run = runs.full_run(records=[], not_run=["no kernel was run on a GPU: <none> here"])
    run.checks = [
        Check("dwconv", "1x8x9x9 K7", "fp32", "cpu", "ok", error=1e-7, allowed_error=1e-6),
        Check("dwconv", "1x8x9x9 K9", "fp32", "cpu", "wrong", "gradient <dx>", math.nan, 1e-6),
        Check("grn", "1x8x9x9", "bf16", "eager", "unavailable", "no bf16"),
    ]
    _, page, _ = write(run)
    assert "no kernel was run on a GPU: <none> here" in page.text
    assert "Numerical checks that failed: 1 of 3" in page.text
    assert "gradient <dx>" in page.text
    assert "NaN" in page.text


def test_names_are_escaped(write):
    run = small(runs.full_run(machine=runs.machine(cpu="<b>Xeon & 'co'</b>")), BLOCK)
    text, page, _ = write(run)
    assert "<b>Xeon" not in text
    assert "<b>Xeon & 'co'</b>" in page.text


def test_importing_it_needs_no_report_libraries(monkeypatch):
    for name in ("jinja2", "matplotlib", "convnext_kernels.bench.report", "convnext_kernels.bench.charts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    import convnext_kernels.bench.report  # noqa: F401


def test_summaries_are_geometric_means():
    run = small(runs.full_run(), BLOCK, "block/V1-C192-28x28-b1-fp32")
    run.records = [r for r in run.records if r.candidate in (OURS, EAGER)]
    other = "block/V1-C192-28x28-b1-fp32-forward"
    for case, ours in ((BLOCK, 2.0), (other, 0.5)):
        run = runs.replace(run, case, OURS, times=runs.times(1 / ours, noise=0))
        run = runs.replace(run, case, EAGER, times=runs.times(1.0, noise=0))
    found = report.summarise(run.cases().values())
    assert found.cases == 2
    assert found.to_eager == pytest.approx(1.0)
    assert found.to_peer == pytest.approx(1.0)
    assert (found.slower_than_eager, found.slower_than_peer) == (1, 1)
    assert report.summarise([]) == report.Summary(0, None, None, 0, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1, "1.00"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12346"), (-1.5, "-1.50")],
)
def test_numbers(value, text):
    assert number(value) == text


def test_numbers_that_are_none():
    assert number(math.nan) == "nan"
    assert number(math.inf) == "inf"


def test_short_names():
    assert short("torch.compile, max-autotune") == "max-autotune"
    assert short("OpenVINO") == "OpenVINO"
