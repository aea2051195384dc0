import sys

import pytest
from click.shell_completion import ShellComplete

from convnext_kernels import cli, environment
from convnext_kernels.spec import BackendError


def test_help_names_every_command(run):
    result = run("--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) <= 25
    for name, (example, line) in cli.COMMANDS.items():
        assert f"  {name} {example} " in result.output
        assert line in result.output
    assert run().output == result.output


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["pl"], {"plan"}),
        (["bench", "--thr"], {"--threads"}),
        (["demo", "--dtype", "b"], {"bf16"}),
    ],
)
def test_completion(words, found):
    complete = ShellComplete(cli.main, {}, "convnext-kernels", "_CONVNEXT_KERNELS_COMPLETE")
    assert {item.value for item in complete.get_completions(words[:-1], words[-1])} == found


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "usage:" in result.output.lower()
    lines = result.output.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert lines[-1].strip().startswith(f"Example: convnext-kernels {command} ")


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


def test_a_backend_error_keeps_its_message(fails, monkeypatch):
    def refuse():
        raise BackendError("cpu: no reason")

    monkeypatch.setattr(environment, "collect", refuse)
    assert fails("info", words=()) == "Error: cpu: no reason"


def test_a_missing_library_names_the_extra(fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "psutil", None)  # makes the import raise ModuleNotFoundError
    fails("bench", words=("psutil", 'pip install "convnext-kernels[demo]"'))
    monkeypatch.setitem(sys.modules, "timm", None)
    fails("roadmap", "--regime", "resnet200", words=("timm", 'pip install "convnext-kernels[demo]"'))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    small = ("--model", "torchvision/convnext_tiny", "--size", 32, "--repeats", 1, "--dtype", "fp32")
    fails("demo", *small, "--report", tmp_path / "r.html", words=("jinja2", 'pip install "convnext-kernels[demo]"'))


def test_a_broken_library_is_not_called_missing(fails, monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'a_part'", name="a_part")

    monkeypatch.setattr(environment, "collect", broken)
    fails("info", words=("ModuleNotFoundError: No module named 'a_part'", "--debug"))
