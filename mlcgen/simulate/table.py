"""How the command line shows a simulation: a row for each case."""

from collections.abc import Callable

from mlcgen.simulate.report import Percentiles
from mlcgen.simulate.run import Case, Simulation

__all__ = ["print_simulation", "rows"]

Show = Callable[[Case], str]

SPEED: dict[str, Show] = {
    "finished\nrequests/s": lambda case: f"{case.summary.requests_per_s:.3g}",
    "generated\ntokens/s": lambda case: f"{case.summary.tokens_per_s:.4g}",
    "first token, s\np50/p95/p99": lambda case: _percentiles(case.summary.ttft, 1),
    "per token, ms\np50/p95/p99": lambda case: _percentiles(case.summary.tpot, 1e3),
    "gap, ms\np99/max": lambda case: f"{_number(case.summary.gap.p99 * 1e3)}/{_number(case.summary.longest_gap * 1e3)}",
}
USE: dict[str, Show] = {
    "whole request, s\np50/p95/p99": lambda case: _percentiles(case.summary.latency, 1),
    "busy": lambda case: f"{case.summary.busy:.0%}",
    "pages\nmean/peak": lambda case: f"{case.summary.mean_pages:.0f}/{case.summary.peak_pages}",
    "waste": lambda case: f"{case.summary.waste:.1%}",
    "pre-\nempted": lambda case: str(case.summary.num_preemptions),
    "prefix\nhits": lambda case: f"{case.summary.hit_rate:.0%}",
    "queue\nat end": lambda case: f"{case.summary.queue_at_end}{' overloaded' if case.summary.is_overloaded else ''}",
}
WIDTH = 120  # that the tables need; no figure is cut
VARIED: dict[str, Show] = {  # shown where there are several
    "rate\n1/s": lambda case: f"{case.rate:.4g}",
    "tokens\n/step": lambda case: str(case.tokens_per_step),
    "prompts": lambda case: case.prefill,
    "repli-\ncas": lambda case: str(case.replicas),
}


def print_simulation(simulation: Simulation) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    for columns in (SPEED, USE):
        header, cells = rows(simulation.cases, columns)
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in header:
            table.add_column(name, justify="right", no_wrap=True)
        for row in cells:
            table.add_row(*row)
        console.print(table)
    for line in footer(simulation):
        console.print(line, markup=False)


def rows(cases: list[Case], columns: dict[str, Show]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; the first column is the rate."""
    varied = {
        name: show for index, (name, show) in enumerate(VARIED.items()) if not index or len(set(map(show, cases))) > 1
    }
    shown = varied | columns
    return list(shown), [[show(case) for show in shown.values()] for case in cases]


def footer(simulation: Simulation) -> list[str]:
    server, (middle, largest) = simulation.server, simulation.fit_errors
    first = simulation.cases[0]
    failed = sum(case.summary.num_failed for case in simulation.cases)
    return [
        f"requests  {first.summary.num_requests} a row"
        + (f"; {failed} of all rows failed: too long for the context or the pages" if failed else ""),
        f"engine    {server.num_pages} pages of {server.page_size} tokens, {server.max_batch} sequences, "
        f"{first.tokens_per_step} tokens a step and {first.replicas} replicas in the first row",
        f"cost      {simulation.source}: {simulation.num_steps} steps, fitted within {middle:.1%} (median), "
        f"{largest:.0%} (largest)",
    ]


def _percentiles(seconds: Percentiles, scale: float) -> str:
    return "/".join(_number(value * scale) for value in (seconds.p50, seconds.p95, seconds.p99))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
