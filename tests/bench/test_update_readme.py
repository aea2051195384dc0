import re

import pytest

from convnext_kernels.bench.results import EAGER, OURS, ratio, save
from tests.bench import runs

BLOCK = "block/V1-C96-56x56-b1-fp32-forward"
MODEL = "model/ConvNeXt-T-224-b1-fp32-forward"


@pytest.fixture
def script(program):
    return program("update_readme")


@pytest.fixture
def checkout(script, tmp_path):
    """The files that the script reads and writes, and a call of it."""

    class Checkout:
        readme = tmp_path / "README.md"
        docs = tmp_path / "docs" / "benchmarks.md"
        charts = tuple(tmp_path / "docs" / "images" / f"speedup-{name}.svg" for name in ("light", "dark"))
        results = tmp_path / "benchmarks" / "results"

        def call(self, *arguments):
            return script.main(["--root", str(tmp_path), *arguments])

    Checkout.results.mkdir(parents=True)
    Checkout.docs.parent.mkdir()
    for file in (Checkout.readme, Checkout.docs):
        file.write_text(f"before\n\n{script.BEGIN}\nold\n{script.END}\n\nafter\n", encoding="utf-8")
    return Checkout()


def tables(text):
    """The cells of every Markdown table: titles, then rows."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()] for table in found]


def test_readme_and_docs(checkout):
    pytest.importorskip("matplotlib")
    run = runs.full_run()
    save(run, checkout.results / "cpu.json")
    assert checkout.call("--check") == 1
    assert checkout.call() == 0
    cases = run.cases()
    for file in (checkout.readme, checkout.docs):
        text = file.read_text(encoding="utf-8")
        assert text.startswith("before\n\n<!-- results: begin")
        assert text.endswith("<!-- results: end -->\n\nafter\n")
        assert "old" not in text
        words = " ".join(text.split())
        assert re.search("Example Xeon 6.*2 cores, 2 threads, PyTorch 2.14.1, 2026-11-24", words)
        assert "`convnext-kernels bench --full`" in words
        assert not re.search(r"\d\.\d+x", text), "a bare ratio"
    (short,) = tables(checkout.readme.read_text(encoding="utf-8"))
    assert short[0] == ["", "fp32", "bf16"]
    assert f"{ratio(cases[MODEL]):.2f} times faster than eager" in short[2][1]
    model, training, rival, block, *_ = tables(checkout.docs.read_text(encoding="utf-8"))
    assert {"ConvNeXt-T 224", "ConvNeXt-B 384"} <= {line[0] for line in model[2:]}
    assert all(" / " in line[-1] for line in training[2:])
    assert {"ResNet-50 224", "ViT-B/16 224"} <= {line[0] for line in rival[2:]}
    assert len(block) == 2 + sum(name.startswith("block/") and "forward" in name for name in cases)
    for chart in checkout.charts:
        svg = chart.read_text(encoding="utf-8")
        assert f"convnext_kernels {ratio(cases[MODEL]):.2f}" in svg
        assert ">ConvNeXt-T, batch 1<" in svg
    assert checkout.call("--check") == 0


def test_pages_of_the_site(script, checkout):
    pytest.importorskip("matplotlib")
    run = runs.full_run()
    save(run, checkout.results / "cpu.json")
    folder = checkout.docs.parent
    counts = folder.parent / "proofs" / "records" / "triton_counts.md"
    for file in (
        folder / "index.md",
        folder / "ops" / "dwconv.md",
        folder / "ops" / "grn.md",
        folder / "ops" / "typed.md",
    ):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"before\n\n{script.BEGIN}\nold\n{script.END}\n", encoding="utf-8")
    (folder / "ops" / "typed.md").write_text("by hand\n")
    counts.parent.mkdir(parents=True)
    counts.write_text(
        "| figure | counted | floor |\n|---|---|---|\n| dwconv 7x7 forward: launches | 1 | 1 |\n"
        "| dwconv 7x7 forward: bytes per pixel | 4.03 C | 4 |\n| dwconv3d 3x3: launches | 9 | 1 |\n"
    )
    assert checkout.call() == 0
    home = (folder / "index.md").read_text(encoding="utf-8")
    assert "](images/speedup-light.svg#only-light)" in home
    assert "](images/speedup-dark.svg#only-dark)" in home
    page = (folder / "ops" / "dwconv.md").read_text(encoding="utf-8")
    *times, counted = tables(page)
    expected = [c for c in run.cases() if re.match(r"dwconv/K7-.*-(forward|training)$", c)]
    assert sum(len(table) - 2 for table in times) == len(expected) > 0
    assert counted == [["case", "launches", "bytes per pixel"], ["---"] * 3, ["7x7 forward", "1", "4.03 C"]]
    assert "Measured on Example Xeon" in page
    assert "proofs/triton_executed.py --update" in page
    assert "No record yet." in (folder / "ops" / "grn.md").read_text(encoding="utf-8")
    assert (folder / "ops" / "typed.md").read_text() == "by hand\n"
    assert checkout.call("--check") == 0
    counts.write_text(counts.read_text().replace("4.03", "4.10"))
    assert checkout.call("--check") == 1


def test_a_loss_reads_as_a_loss(script):
    run = runs.replace(runs.full_run(), BLOCK, EAGER, times=runs.times(2.0, 0))
    for ours, words in ((1.6, "1.25 times faster than eager"), (2.5, "1.25 times slower than eager")):
        assert script.compared(runs.replace(run, BLOCK, OURS, times=runs.times(ours, 0)).cases()[BLOCK], EAGER) == words


def test_the_newest_complete_run_counts(script, checkout):
    few = runs.full_run().records[:3]

    def add(name, created, device="cpu", complete=True, commit="c", **machine):
        run = runs.full_run(device, records=few, created=created, complete=complete, machine=runs.machine(**machine))
        run.machine["commit"] = commit
        save(run, checkout.results / name)

    add("a.json", "2026-03-02T00:00:00+00:00", commit="newest")
    add("b.json", "2026-03-02T00:30:00+02:00", commit="older, by its offset")
    add("c.json", "2026-04-01T00:00:00+00:00", commit="incomplete", complete=False)
    add("d.json", "2026-01-01T00:00:00+00:00", commit="tie, first", cpu="Other")
    add("e.json", "2026-01-01T00:00:00+00:00", commit="tie, last", cpu="Other")
    add("f.json", "2026-02-01T00:00:00+00:00", device="cuda", commit="gpu", gpus=("H100, compute capability 9.0",))
    (checkout.results / "notes.txt").write_text("not a result")
    assert [run.machine["commit"] for run in script.records(checkout.results)] == ["newest", "gpu", "tie, last"]


def test_odd_run(script):
    run = runs.odd_run()
    text = "\n".join(script.render(run))
    assert "| wrong |" in text
    assert "Warning: other processes use 34% of the machine." in text
    assert "results were wrong or failed" in text


def test_no_record(checkout):
    assert checkout.call() == 0
    for file in (checkout.readme, checkout.docs):
        assert "No record yet." in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["nothing", "{end} {begin}", "{begin} {begin} {end}", "{begin}"])
def test_without_markers(script, checkout, capsys, text):
    checkout.docs.write_text(text.format(begin=script.BEGIN, end=script.END))
    assert checkout.call() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "benchmarks.md: expected one <!-- results: begin" in line


def test_bad_files_are_named(checkout, capsys):
    (checkout.results / "bad.json").write_text("{}")
    assert checkout.call() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "bad.json" in line
    (checkout.results / "bad.json").unlink()
    checkout.readme.unlink()
    assert checkout.call() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No such file" in line
