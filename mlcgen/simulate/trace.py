"""When requests come and how long they are: drawn from distributions, or read from a file."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlcgen.errors import SimulationError

__all__ = ["Arrival", "Lengths", "Load", "make_trace", "parse_lengths", "read_trace"]

BURST_VARIATION = 3.0  # standard deviation over mean of a bursty load's gaps; a Poisson load has 1
P95 = 1.6449  # standard deviations from a normal distribution's median to its 95th percentile
MOST_TOKENS = 1 << 24  # of one request; no memory holds more


@dataclass(frozen=True)
class Arrival:
    """A request of a trace. `prompt_tokens` has the `shared_tokens` first ones that it shares with its group."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    group: str | None = None
    shared_tokens: int = 0


@dataclass(frozen=True)
class Lengths:
    """Tokens, lognormal by their median and 95th percentile; always the same where the two are equal."""

    median: int
    p95: int

    def draw(self, random: np.random.Generator, count: int) -> list[int]:
        sigma = math.log(self.p95 / self.median) / P95
        drawn = np.rint(np.exp(random.normal(math.log(self.median), sigma, count)))
        tokens: list[int] = np.clip(drawn, 1, MOST_TOKENS).astype(int).tolist()
        return tokens


@dataclass(frozen=True)
class Load:
    """What `make_trace` draws from."""

    num_requests: int
    arrivals: Literal["poisson", "bursty"]
    prompt: Lengths
    output: Lengths
    shared_prefix: int = 0  # tokens before each prompt that all have in common
    seed: int = 0


def parse_lengths(text: str) -> Lengths:
    """ "N", or "MEDIAN:P95". Raises SimulationError."""
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise SimulationError(f"{text!r} is no number of tokens; write N, or MEDIAN:P95 for lognormal lengths")
    median, p95 = int(parts[0]), int(parts[-1])
    if not 1 <= median <= p95 <= MOST_TOKENS:
        raise SimulationError(f"the lengths {text!r} need 1 <= median <= p95 <= {MOST_TOKENS}")
    return Lengths(median, p95)


def make_trace(load: Load, rate: float, context_length: int | None = None) -> list[Arrival]:
    """A load of `rate` requests a second. Traces of one seed differ between rates in their gaps' scale alone.

    context_length: prompts are cut so that they, and one token more, stay below it.
    """
    random = np.random.default_rng(load.seed)
    shape = 1.0 if load.arrivals == "poisson" else BURST_VARIATION**-2
    seconds = np.cumsum(random.gamma(shape, 1 / shape, load.num_requests)) / rate
    prompts = load.prompt.draw(random, load.num_requests)
    outputs = load.output.draw(random, load.num_requests)
    shared = load.shared_prefix
    most = MOST_TOKENS if context_length is None else context_length - 1
    if shared >= most:
        raise SimulationError(f"--shared-prefix {shared} leaves no room for a prompt in a context of {context_length}")
    return [
        Arrival(at, min(shared + prompt, most), output, "all" if shared else None, shared)
        for at, prompt, output in zip(seconds.tolist(), prompts, outputs, strict=True)
    ]


def read_trace(file: Path) -> list[Arrival]:
    """A trace of JSON lines, in the order of their arrival.

    A line has `arrival_s`, `prompt_tokens` and `output_tokens`; with `group` and `shared_tokens` the prompt begins with
    as many tokens that all of its group have in common. Raises SimulationError, which names file and line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SimulationError(f"cannot read the trace {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SimulationError(f"the trace {file} is not UTF-8 text: {error}") from error
    found = [_arrival(f"{file}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise SimulationError(f"the trace {file} has no requests; write one JSON object a line")
    return sorted(found, key=lambda arrival: arrival.seconds)


def _arrival(where: str, line: str) -> Arrival:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SimulationError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SimulationError(f"{where} is no JSON object; write arrival_s, prompt_tokens and output_tokens")
    _refuse_unknown(where, value, ("arrival_s", "prompt_tokens", "output_tokens", "group", "shared_tokens"))
    seconds, group = value.get("arrival_s"), value.get("group")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < 1e12:
        raise SimulationError(f"{where}: arrival_s is {seconds!r:.40}; it must be seconds from the start, 0 or more")
    prompt, output = (_count(where, value, name, 1) for name in ("prompt_tokens", "output_tokens"))
    shared = _count(where, value, "shared_tokens", 0) if "shared_tokens" in value else 0
    if (group is not None and not isinstance(group, str)) or (group is None) != (shared == 0) or shared > prompt:
        raise SimulationError(
            f"{where}: group {group!r:.40} with shared_tokens {shared} of {prompt}; "
            "give a group's name with 1 to prompt_tokens shared ones, or neither"
        )
    return Arrival(float(seconds), prompt, output, group, shared)


def _refuse_unknown(where: str, value: dict[str, Any], known: Sequence[str]) -> None:
    if unknown := set(value) - set(known):
        raise SimulationError(f"{where} has an unknown field {min(unknown)!r:.40}; have: {', '.join(known)}")


def _count(where: str, value: dict[str, Any], name: str, least: int) -> int:
    count = value.get(name)
    if type(count) is not int or not least <= count <= MOST_TOKENS:
        raise SimulationError(f"{where}: {name} is {count!r:.40}; it must be an integer from {least} to {MOST_TOKENS}")
    return count
