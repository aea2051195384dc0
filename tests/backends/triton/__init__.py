import os

import pytest

# tests/conftest.py sets the variable on machines without a GPU.
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "1", reason="for Triton's interpreter: set TRITON_INTERPRET=1"
)
