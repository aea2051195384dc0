"""Imported first, so that the scripts in this folder use the package and the tests of their own checkout."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "proofs" / "records"
# Python puts only this folder on the path of `python proofs/x.py`.
sys.path.insert(0, str(ROOT))
