"""A worker process: opens one engine, then answers one request per line, asleep in between.

    python -m mlcgen.bench.worker

JSON lines. The first on stdin says what to open: the fields of `engines.Spec`, or {"engine": "probe", ...}. Each
further one is a call's arguments. Each answer is {"result": ..., "seconds": ..., "peak_memory_bytes": ...}. An error
ends the process, its message the last line on stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TextIO

from mlcgen.errors import MlcgenError


def serve(requests: TextIO, answers: TextIO) -> None:
    call: Callable[..., Any] = _open
    for line in requests:
        start = time.perf_counter()
        result = call(**json.loads(line))
        seconds = time.perf_counter() - start
        if call is _open:
            call, result = result, None
        answer = {"result": _plain(result), "seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
        print(json.dumps(answer), file=answers, flush=True)


def _open(**spec: Any) -> Callable[..., Any]:
    if spec["engine"] == "webgpu probe":
        from mlcgen.bench.webgpu_probe import open_webgpu_probe

        return open_webgpu_probe()
    if spec["engine"] == "cuda probe":
        from mlcgen.bench.cuda_probe import open_cuda_probe

        return open_cuda_probe()
    if spec["engine"] == "probe":
        from mlcgen.bench.probe import open_probe

        return open_probe(spec["threads"])
    if spec["engine"] == "link probe":
        from mlcgen.bench.link import open_link_probe

        return open_link_probe(spec["kind"], spec["file"])
    from mlcgen.bench.engines import open_engine

    return open_engine(spec)


def _plain(result: Any) -> Any:
    return asdict(result) if is_dataclass(result) and not isinstance(result, type) else result


def peak_memory_bytes() -> int | None:
    """The most physical memory that this process has had, or None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def _private_stdout() -> TextIO:
    """stdout for answers alone: what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> None:
    try:
        serve(sys.stdin, _private_stdout())
    except MlcgenError as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
