import importlib.util
import re
from pathlib import Path

import pytest

from convnext_kernels.bench.results import OURS, ratio, save
from tests.bench import runs

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "update_readme.py"
BLOCK = "block/V1-C96-56x56-b1-fp32-forward"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("update_readme", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def house(script, tmp_path):
    """A README with markers, a folder of results, and a call of the script on both."""

    class House:
        readme = tmp_path / "README.md"
        results = tmp_path / "results"

        def call(self, *arguments):
            return script.main(["--readme", str(self.readme), "--results", str(self.results), *arguments])

    House.readme.write_text(f"before\n\n{script.BEGIN}\nold\n{script.END}\n\nafter\n", encoding="utf-8")
    House.results.mkdir()
    return House()


def tables(text):
    """The cells of every Markdown table: head, then rows."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()] for table in found]


def test_tables(house):
    run = runs.full_run()
    save(run, house.results / "cpu.json")
    assert house.call() == 0
    text = house.readme.read_text(encoding="utf-8")
    assert text.startswith("before\n\n<!-- results: begin")
    assert text.endswith("<!-- results: end -->\n\nafter\n")
    assert "old" not in text
    for words in ("### Example Xeon 6", "2 cores, 2 threads, PyTorch 2.14.1, mode full, 2026-11-24"):
        assert words in text
    assert "`convnext-kernels bench --full`" in " ".join(text.split())
    block, training, models = tables(text)
    assert block[0] == ["block", "fp32 batch 1", "fp32 batch 8", "bf16 batch 1", "bf16 batch 8"]
    assert [line[0] for line in block[2:6]] == ["V1 C96 56x56", "V1 C192 28x28", "V1 C384 14x14", "V1 C768 7x7"]
    assert len(block) == 2 + 8
    assert f"**{ratio(run.cases()[BLOCK]).value:.2f}x**" in block[2][1]
    assert training[0] == ["training", "fp32", "bf16"]
    assert all("MiB" in cell for line in training[2:] for cell in line[1:])
    assert {"ConvNeXt-T 224", "ResNet-50 224", "ViT-B/16 224"} <= {line[0] for line in models[2:]}
    assert models[0][:3] == ["model", "GFLOP", "M params"]
    for line in (line for table in (block, training, models) for line in table):
        assert len(line) <= 7
    words = " ".join(text.split())
    assert re.search(
        r"dwconv, forward: \d\.\d\dx against eager and \d\.\d\dx against the best peer, slower than", words
    )
    assert "layernorm, forward" in words


def test_it_settles(house):
    save(runs.full_run(), house.results / "cpu.json")
    assert house.call("--check") == 1
    assert house.call() == 0
    before = house.readme.read_text(encoding="utf-8")
    assert house.call("--check") == 0
    assert house.call() == 0
    assert house.readme.read_text(encoding="utf-8") == before


def test_check_writes_nothing_and_says_one_line(house, capsys):
    save(runs.full_run(), house.results / "cpu.json")
    before = house.readme.read_text(encoding="utf-8")
    assert house.call("--check") == 1
    assert house.readme.read_text(encoding="utf-8") == before
    (line,) = capsys.readouterr().err.splitlines()
    assert "README.md is not up to date" in line


def test_the_newest_complete_run_counts(script, house):
    few = runs.full_run().records[:3]

    def add(name, created, device="cpu", complete=True, commit="c", **machine):
        run = runs.full_run(device, records=few, created=created, complete=complete, machine=runs.machine(**machine))
        run.machine["commit"] = commit
        save(run, house.results / name)

    add("a.json", "2026-03-02T00:00:00+00:00", commit="newest")
    add("b.json", "2026-03-02T00:30:00+02:00", commit="older, by its offset")
    add("c.json", "2026-04-01T00:00:00+00:00", commit="incomplete", complete=False)
    add("d.json", "2026-01-01T00:00:00+00:00", commit="tie, first", cpu="Other")
    add("e.json", "2026-01-01T00:00:00+00:00", commit="tie, last", cpu="Other")
    add("f.json", "2026-01-01T00:00:00+00:00", device="cuda", commit="gpu", gpus=("H100, compute capability 9.0",))
    (house.results / "notes.txt").write_text("not a result")
    found = script.runs_of_record(house.results)
    assert [run.machine["commit"] for run in found] == ["newest", "tie, last", "gpu"]
    assert house.call() == 0
    text = house.readme.read_text(encoding="utf-8")
    assert "### H100\n" in text
    assert "bench --full --device cuda" in " ".join(text.split())


def test_odd_run(house):
    run = runs.odd_run()
    run.complete = True
    save(run, house.results / "odd.json")
    assert house.call() == 0
    text = house.readme.read_text(encoding="utf-8")
    block = tables(text)[0]
    assert block[2][1] == "wrong"
    assert "Beware: other processes use 34% of the machine." in text
    assert "Wrong or failed, and therefore without a speed: 4 of" in text


def test_wide_tables_are_split(house):
    save(runs.full_run("cuda"), house.results / "gpu.json")
    assert house.call() == 0
    found = tables(house.readme.read_text(encoding="utf-8"))
    assert [table[0][0] for table in found] == ["block", "block", "training", "model", "model"]
    assert all(len(table[0]) <= 7 for table in found)


def test_quick_run_has_the_tables_it_can(house):
    run = runs.full_run(mode="quick")
    run.records = [r for r in run.records if r.case == BLOCK and r.candidate in ("eager", OURS)]
    save(run, house.results / "quick.json")
    assert house.call() == 0
    text = house.readme.read_text(encoding="utf-8")
    assert len(tables(text)) == 1
    assert "Single ops" not in text


def test_no_run_of_record(house):
    assert house.call() == 0
    assert "No run of record yet." in house.readme.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["nothing", "{end} {begin}", "{begin} {begin} {end}", "{begin}"])
def test_readme_without_markers(script, house, capsys, text):
    house.readme.write_text(text.format(begin=script.BEGIN, end=script.END))
    assert house.call() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected one <!-- results: begin" in line


def test_bad_files_are_named(house, capsys):
    (house.results / "bad.json").write_text("{}")
    assert house.call() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "bad.json" in line
    house.readme.unlink()
    assert house.call() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No such file" in line
