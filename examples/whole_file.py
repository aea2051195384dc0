"""Files that survive a kill: what the training examples write with."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write(file: Path, content: Callable[[BinaryIO], object]) -> None:
    """Write a file that is there whole or, as before, not at all, whenever the process ends."""
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as stream:
        content(stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)
