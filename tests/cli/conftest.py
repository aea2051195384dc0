import pytest
from click.testing import CliRunner, Result

from convnext_kernels.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command line in this process, in an empty folder: ``run("info", "--json")``."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def fails(run):
    """Call it, expect one line on stderr that holds every `word` and nothing of a traceback; return that line."""

    def call(*arguments: object, words: tuple[str, ...], code: int = 1) -> str:
        result = run(*arguments)
        assert result.exit_code == code, result.output
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ")
        for word in words:
            assert word in line
        return line

    return call
