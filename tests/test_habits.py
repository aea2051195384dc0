"""What the project's own files promise one another."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("tool", ["ruff", "clang-format"])
def test_pre_commit_and_extra_pin_the_same_version(tool):
    pins = {
        file: set(re.findall(rf'"{tool}==([0-9.]+)"', (ROOT / file).read_text()))
        for file in ("pyproject.toml", ".pre-commit-config.yaml")
    }
    assert pins["pyproject.toml"]
    assert pins["pyproject.toml"] == pins[".pre-commit-config.yaml"]


def test_readme_has_the_commands_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    for name, part in (("main", "convnext-kernels demo"), ("test", "pytest")):
        block = re.search(rf"<!-- command: {name} -->\n```bash\n(.+?)```", readme, re.DOTALL)
        assert block, name
        assert part in block.group(1)


def test_changelog_names_the_version():
    from convnext_kernels import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
