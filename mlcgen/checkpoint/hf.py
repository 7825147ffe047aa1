"""Placeholder."""

from pathlib import Path
from mlcgen.checkpoint.base import Checkpoint
from mlcgen.errors import UnsupportedError


def open_hf(path: Path, weights: bool = True) -> Checkpoint:
    raise UnsupportedError(f"{path}: HF directories are not read yet")
