"""Write files that are never half written, even if the process is killed. Used by the training examples."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write(file: Path, content: Callable[[BinaryIO], object]) -> None:
    """Write a file. If the process ends during that, the old file or none is there, never a part of the new one."""
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as stream:
        content(stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)
