"""JSON objects in files that others wrote."""

import json
from pathlib import Path
from typing import Any

from mlcgen.errors import MlcgenError

__all__ = ["read_object"]

LARGEST = 1 << 30  # bytes, of any file that is read as JSON


def read_object(file: Path, error_type: type[MlcgenError], advice: str, most: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes. Raises `error_type`, which ends with the advice, otherwise."""
    try:
        with file.open("rb") as stream:
            text = stream.read(most + 1)
        if len(text) > most:
            raise error_type(f"cannot read {file}: it has more than {most} bytes; {advice}")
        value = json.loads(text.decode("utf-8"))
    except OSError as error:
        raise error_type(f"cannot read {file}: {error.strerror}; {advice}") from error
    except (ValueError, RecursionError) as error:
        raise error_type(f"cannot read {file}: it is not JSON ({str(error)[:100]}); {advice}") from error
    if not isinstance(value, dict):
        raise error_type(f"{file} holds a JSON {type(value).__name__}, not an object; {advice}")
    return value
