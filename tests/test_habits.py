"""What the project's own files promise one another."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a:\n- b\n  c\n  - d\n    e\n- f\n\ng", "a:\n\n- b\n    c\n    - d\n        e\n- f\n\ng"),
        ("1. a\n\n   b\n   - c\n\nd", "1. a\n\n    b\n    - c\n\nd"),
        ("```\n- a\n  - b\n```", "```\n- a\n  - b\n```"),
        ("- a\n  ```\n  b\n    c\n  ```\n- d", "- a\n    ```\n    b\n      c\n    ```\n- d"),
        ("| a |\n|---|\n| - b |", "| a |\n|---|\n| - b |"),
    ],
    ids=["nested", "numbered", "code", "code in a list", "table"],
)
def test_the_site_reads_lists_as_github_does(text, wanted):
    assert runpy.run_path(str(ROOT / "docs" / "hooks.py"))["lists"](text) == wanted
