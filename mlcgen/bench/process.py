"""The parent's side of a worker process."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mlcgen.errors import BenchError

COMMAND = [sys.executable, "-m", "mlcgen.bench.worker"]
REST_S = 0.1  # an engine that uses no CPU for so long is asleep
LONGEST_REST_S = 5.0


@dataclass(frozen=True)
class Answer:
    result: Any
    seconds: float  # that the call took inside the worker
    peak_memory_bytes: int | None  # of the worker since it started


class Worker:
    """One engine in a process of its own. Leaving the `with` block ends the process, whatever it is doing.

    The process has a session of its own, so that Ctrl-C reaches only us; it also ends when its stdin closes.
    """

    def __init__(self, name: str, spec: Mapping[str, Any]) -> None:
        """Start the process and open the engine. Raises BenchError if that fails."""
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (until close)
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            self.opened = self._ask(spec)
        except BaseException:
            self.close()
            raise

    def call(self, **arguments: Any) -> Answer:
        """Run the engine once and wait until it is idle. Raises BenchError if the process ends instead of answering."""
        answer = self._ask(arguments)
        self._rest()
        return answer

    def _ask(self, request: Mapping[str, Any]) -> Answer:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchError(f"{self.name} failed: {self._last_words()}")
        return Answer(**json.loads(line))

    def _rest(self) -> None:
        """Thread pools spin for a while after their work, which would slow down the engine that runs next."""
        end, before = time.monotonic() + LONGEST_REST_S, -1
        while (now := _cpu_ticks(self._process.pid)) != before and time.monotonic() < end:
            before = now
            time.sleep(REST_S)

    def _last_words(self) -> str:
        """The last line of stderr, or how the process ended."""
        status = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"{said[-1]} ({how})" if said else how

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _cpu_ticks(pid: int) -> int:
    """CPU time of all threads of a process; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])  # user and system time
