import sys

from convnext_kernels import environment

HELP = """
import sys
from convnext_kernels.cli import main
try:
    main(["--help"])
except SystemExit:
    heavy = "torchvision timm transformers sklearn skimage matplotlib jinja2 rich.progress convnext_kernels.cli.demo"
    print([name for name in heavy.split() if name in sys.modules])
"""


def test_help_imports_no_command_and_no_library(run_python):
    assert run_python(HELP).splitlines()[-1] == "[]"


def test_wrong_usage_is_one_line(fails):
    fails("nonsense", words=("nonsense",), code=2)
    fails("demo", "--repeats", "0", words=("--repeats",), code=2)
    fails("demo", "--dtype", "int8", words=("--dtype", "int8"), code=2)


def test_an_unforeseen_error_is_one_line_and_debug_shows_it(run, fails, monkeypatch):
    def broken():
        raise RuntimeError("first\n  second")

    monkeypatch.setattr(environment, "collect", broken)
    fails("info", words=("RuntimeError: first second", "--debug"))
    result = run("--debug", "info")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_a_missing_library_names_the_extra(fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)  # makes the import raise ModuleNotFoundError
    small = ("--model", "torchvision/convnext_tiny", "--size", 32, "--repeats", 1, "--dtype", "fp32")
    fails("demo", *small, "--report", tmp_path / "r.html", words=("jinja2", 'pip install "convnext-kernels[demo]"'))


def test_a_broken_library_is_not_called_missing(fails, monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'a_part'", name="a_part")

    monkeypatch.setattr(environment, "collect", broken)
    fails("info", words=("ModuleNotFoundError: No module named 'a_part'", "--debug"))
