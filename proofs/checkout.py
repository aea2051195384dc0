"""Imported first: the scripts here examine the checkout that they stand in, and use what its tests use."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "proofs" / "records"
# Python puts only this folder on the path of `python proofs/x.py`.
sys.path.insert(0, str(ROOT))
