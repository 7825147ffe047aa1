"""How the command line shows a result: what was fast, what it took, and how it compares."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlcgen.cli_output import format_bytes

ABSENT = "-"
Row = Mapping[str, Any]
Show = Callable[[float], str]


def print_result(result: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for header, rows in tables(result):
        console.print(_table(header, rows))
    for line in footer(result):
        console.print(line, markup=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def tables(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows) of each table; the first cell of a row is the engine's name."""
    engines = _labelled(result["engines"])
    made = [_speed(engines, result["options"]), _cost(engines, result["options"])]
    if result["options"].get("weight_memory"):
        made.append(_streaming([row for row in engines if row["engine"] == "mlcgen"]))
    peers = [row["name"] for row in engines if row["engine"] != "mlcgen"]
    if peers:
        made.append(_ratios(engines, peers))
    return made


def _labelled(engines: Sequence[Row]) -> list[Row]:
    """The rows, with their targets in their names where there are several."""
    if len({row["target"] for row in engines if row["target"]}) < 2:
        return list(engines)
    return [{**row, "name": f"{row['name']} {row['target']}"} if row["target"] else row for row in engines]


Table = tuple[list[str], list[list[str]]]


def _speed(engines: Sequence[Row], options: Mapping[str, Any]) -> Table:
    columns: dict[str, tuple[str, Show]] = {
        f"prefill {options['prompt']}\ntokens/s": ("prefill_tokens_per_s", _rate),
        "first token\nms": ("first_token_s", lambda seconds: f"{seconds * 1e3:.0f}"),
        f"decode {options['tokens']}\ntokens/s": ("decode_tokens_per_s", _rate),
        f"{options['long_context']} cached\ntokens/s": ("long_decode_tokens_per_s", _rate),
        f"batch of {options['batch']}\ntokens/s": ("batch_decode_tokens_per_s", _rate),
    }
    rows = [[row["name"], *(_median(row, metric, show) for metric, show in columns.values())] for row in engines]
    return ["", *columns], rows


def _cost(engines: Sequence[Row], options: Mapping[str, Any]) -> Table:
    header = ["", "load\ns", "load to first\ntoken, s", "peak\nmemory", "decode\nGB/s", "prefill\nGFLOP/s"]
    rows = [
        [
            row["name"],
            _median(row, "load_s", _seconds),
            _median(row, "load_to_first_token_s", _seconds),
            _median(row, "peak_memory_bytes", format_bytes),
            _of_peak(row["achieved"], "decode_bytes_per_s", "decode_peak_share"),
            _of_peak(row["achieved"], "prefill_flops_per_s", "prefill_peak_share"),
        ]
        for row in engines
    ]
    return header, rows


def _streaming(engines: Sequence[Row]) -> Table:
    """Absent where all weights fit."""
    rows = [
        [
            row["name"],
            _median(row, "streamed_bytes_per_step", format_bytes),
            _of_peak(row["achieved"], "streamed_bytes_per_s", "link_share"),
        ]
        for row in engines
    ]
    return ["weights streamed", "per step", "GB/s\n(of the link's)"], rows


RATIOS = {
    "prefill": "prefill_tokens_per_s",
    "decode": "decode_tokens_per_s",
    "long": "long_decode_tokens_per_s",
    "batch": "batch_decode_tokens_per_s",
}


def _ratios(engines: Sequence[Row], peers: Sequence[str]) -> Table:
    rows = [
        [f"{row['name']} / {peer}", *(_ratio(row["ratios"], peer, metric) for metric in RATIOS.values())]
        for row in engines
        if row["engine"] == "mlcgen"
        for peer in peers
    ]
    return ["ratio of tokens/s", *RATIOS], rows


def footer(result: Mapping[str, Any]) -> list[str]:
    """The peaks, what ran where, and what was skipped."""
    machine, options = result["machine"], result["options"]
    turns = "turn" if options["repeat"] == 1 else "turns"
    rows = _labelled(result["engines"])
    return [
        *(f"peaks     {peaks(device)}" for device in result["devices"].values()),
        f"machine   {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads",
        f"versions  {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
        f"medians of {options['repeat']} {turns} after one to warm up; shares are of the peaks, of those of floats",
        *(f"quality   {row['name']}: {_quality(row['quality'])}" for row in rows if row["quality"]),
        *(f"skipped   {row['name']}, {test}: {why}" for row in rows for test, why in _skipped(row)),
        *(f"skipped   {row['name']} {row['target']}: {row['reason']}" for row in result["not_run"]),
    ]


def peaks(device: Mapping[str, Any]) -> str:
    """A device with the peaks that were measured."""
    reading = [
        f"{peak['median'] / 1e9:.1f} GB/s over {format_bytes(int(size))}"
        for size, peak in device["peaks"]["bytes_per_s"].items()
    ]
    computing = [
        f"{peak['median'] / 1e9:.0f} {'GFLOP/s' if dtype.startswith('float') else 'Gop/s'} {dtype}"
        for dtype, peak in device["peaks"]["ops_per_s"].items()
    ]
    link = device["peaks"].get("link_bytes_per_s")
    linking = [f"{link['median'] / 1e9:.1f} GB/s over the link to streamed weights"] if link else []
    return f"{device['name']}: {', '.join([*reading, *computing, *linking]) or 'not measured'}"


def _quality(quality: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in quality.items())


def _skipped(row: Row) -> list[tuple[str, str]]:
    names = {"long": "decode at a long context", "batch": "decode of a batch"}
    return [(names[test], why) for test, why in row["skipped"].items()]


def _median(row: Row, metric: str, show: Show) -> str:
    summary = row["metrics"].get(metric)
    return show(summary["median"]) if summary else ABSENT


def _ratio(ratios: Mapping[str, Mapping[str, float]], peer: str, metric: str) -> str:
    value = ratios.get(peer, {}).get(metric)
    return ABSENT if value is None else f"{value:.2f}"


def _of_peak(achieved: Mapping[str, float], value: str, share: str) -> str:
    if value not in achieved:
        return ABSENT
    return f"{achieved[value] / 1e9:.1f}" + (f" ({achieved[share]:.0%})" if share in achieved else "")


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}"
