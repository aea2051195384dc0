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
        home = tmp_path / "docs" / "index.md"
        chart = tmp_path / "docs" / "images" / "speedup.svg"
        results = tmp_path / "benchmarks" / "results"

        def call(self, *arguments):
            return script.main(["--root", str(tmp_path), *arguments])

    Checkout.results.mkdir(parents=True)
    (tmp_path / "docs" / "ops").mkdir(parents=True)
    Checkout.files = [Checkout.readme, Checkout.docs, Checkout.home]
    Checkout.files += [tmp_path / "docs" / "ops" / f"{op}.md" for op in script.OPS]
    for file in Checkout.files:
        file.write_text(f"before\n\n{script.BEGIN}\nold\n{script.END}\n\nafter\n", encoding="utf-8")
    return Checkout()


def test_readme_and_docs(checkout):
    """What they hold is for `update_readme.py --check`, which CI runs."""
    pytest.importorskip("matplotlib")
    run = runs.full_run()
    save(run, checkout.results / "cpu.json")
    assert checkout.call("--check") == 1
    assert checkout.call() == 0
    speedup = ratio(run.cases()[MODEL])
    for file in checkout.files:
        text = file.read_text(encoding="utf-8")
        assert text.startswith("before\n\n<!-- results: begin")
        assert text.endswith("<!-- results: end -->\n\nafter\n")
        assert "old" not in text
        assert run.created[:10] in text
    assert f"{speedup:.2f} times faster than eager" in checkout.readme.read_text(encoding="utf-8")
    assert f"convnext_kernels {speedup:.2f}" in checkout.chart.read_text(encoding="utf-8")
    assert checkout.call("--check") == 0


def test_a_loss_reads_as_a_loss(script):
    run = runs.replace(runs.full_run(), BLOCK, EAGER, times=runs.times(2.0))
    for ours, words in ((1.6, "1.25 times faster than eager"), (2.5, "1.25 times slower than eager")):
        assert script.compared(runs.replace(run, BLOCK, OURS, times=runs.times(ours)).cases()[BLOCK], EAGER) == words


def test_the_newest_undisturbed_run_is_first(script, checkout):
    few = runs.full_run().records[:3]

    def add(created, complete=True, warnings=()):
        conditions = {"warnings": list(warnings)}
        run = runs.full_run(records=few, created=created, complete=complete, conditions=conditions)
        save(run, checkout.results / f"{len(list(checkout.results.iterdir()))}.json")

    add("2026-03-02T00:30:00+02:00")  # older, by its offset
    add("2026-03-02T00:00:00+00:00")
    add("2026-04-01T00:00:00+00:00", complete=False)
    add("2026-05-01T00:00:00+00:00", warnings=["others"])
    (checkout.results / "notes.txt").write_text("not a result")
    assert [run.created[5:16] for run in script.records(checkout.results)] == [
        "03-02T00:00",
        "03-02T00:30",
        "05-01T00:00",
    ]


@pytest.mark.parametrize("text", ["nothing", "{end} {begin}", "{begin} {begin} {end}", "{begin}"])
def test_without_markers(script, checkout, capsys, text):
    checkout.docs.write_text(text.format(begin=script.BEGIN, end=script.END))
    assert checkout.call() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "benchmarks.md: expected one <!-- results: begin" in line
