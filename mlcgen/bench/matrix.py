"""Results of one or several machines as one HTML page: hardware across, builds down, and what each reached.

A column is a device and the target that ran on it. The page needs neither scripts nor other files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from mlcgen.bench.table import peaks
from mlcgen.cli_output import format_bytes

ABSENT = "–"
Row = Mapping[str, Any]
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Hardware:
    device: str
    target: str  # "" for what only peers ran on
    machine: str  # "" where no machine has run the target


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | None = None  # the exact figure behind the text
    note: str = ""
    rowspan: int = 1


Lines = Mapping[str, Callable[[Row], Cell]]  # name of a line -> its cell of a row


@dataclass(frozen=True)
class Line:
    """A row of the table: one figure of one build."""

    name: str
    cells: list[Cell]  # without those that one above reaches down to


@dataclass
class Build:
    """An artifact, found again on other machines by its folder's name and its quantization; or a peer."""

    name: str
    quantization: str
    engine: str
    rows: dict[int, Row] = field(default_factory=dict)  # by column
    not_run: dict[int, Row] = field(default_factory=dict)  # likewise
    targets: set[str] = field(default_factory=set)  # that it was compiled for

    @property
    def title(self) -> str:
        return self.name if self.quantization in ("", self.name) else f"{self.name}, {self.quantization}"


@dataclass(frozen=True)
class Bar:
    name: str
    text: str
    value: float
    limit: float | None  # what the measured peak would allow


@dataclass(frozen=True)
class Chart:
    """Bars of one column. Each has a scale of its own: devices differ by more than a page is wide."""

    hardware: Hardware
    bars: list[Bar]

    @property
    def scale(self) -> float:
        """The largest that is drawn."""
        return max(max(bar.value, bar.limit or 0.0) for bar in self.bars) or 1.0


@dataclass
class Section:
    """Results that can be compared: of one model, with the same token counts."""

    model: str
    options: Mapping[str, Any]
    results: list[Result] = field(default_factory=list)
    columns: list[Hardware] = field(default_factory=list)
    builds: list[Build] = field(default_factory=list)

    def lines(self, build: Build) -> list[Line]:
        return _lines(self, build)

    @property
    def charts(self) -> dict[str, list[Chart]]:
        """Heading -> a chart for each column that has anything to show."""
        shown = {
            "Decode, tokens/s": ("decode_tokens_per_s", "decode_peak_share"),
            "Prefill, tokens/s": ("prefill_tokens_per_s", "prefill_peak_share"),
        }
        return {heading: _charts(self, *metrics) for heading, metrics in shown.items()}


def page(results: Sequence[Result]) -> str:
    """The HTML of results as `bench` returns them, or `result.read_results`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("matrix.html").read_text(encoding="utf-8"))
    return template.render(sections=sections(results), peaks=peaks)


# Who is where


def sections(results: Sequence[Result]) -> list[Section]:
    found: dict[Any, Section] = {}
    for result in results:
        section = found.setdefault(_key(result), Section(result["model"]["name"], result["options"]))
        section.results.append(result)
    for section in found.values():
        for result in section.results:
            _place_measured(section, result)
        for result in section.results:  # when all columns are known
            _place_not_run(section, result)
    return list(found.values())


def _key(result: Result) -> tuple[Any, ...]:
    """Of what can be compared; a model's name is that of a folder, which machines may name as they like."""
    model, options = result["model"], result["options"]
    sizes = ("prompt", "tokens", "long_context", "batch", "batch_prompt")
    shape = tuple(model[key] for key in sorted(model) if key != "name")
    return (shape, *(options[size] for size in sizes), options.get("weight_memory"))


def _place_measured(section: Section, result: Result) -> None:
    targets: dict[str, str] = {}  # kind of device -> the first target that ran on it
    for row in result["engines"]:
        if row["target"]:
            targets.setdefault(row["kind"], row["target"])
    for row in result["engines"]:
        build = _build(section, row, row["engine"])
        target = row["target"] or targets.get(row["kind"], "")  # a peer stands beside our first target
        hardware = Hardware(row["device"], target, _machine(result, row))
        build.rows[_free_column(section, hardware, build)] = row


def _machine(result: Result, row: Row) -> str:
    machine = result["machine"]
    if row["kind"] == "cpu":
        return f"{machine['threads']} of {machine['cores']} cores"
    return f"in a machine with {machine['cpu']}, {machine['cores']} cores"


def _build(section: Section, row: Row, engine: str) -> Build:
    name, quantization = PurePath(row["name"]).name or row["name"], row["quantization"] or ""
    for build in section.builds:
        if (build.name, build.quantization, build.engine) == (name, quantization, engine):
            break
    else:
        build = Build(name, quantization, engine)
        section.builds.append(build)
    build.targets.update(row["targets"])
    return build


def _free_column(section: Section, hardware: Hardware, build: Build) -> int:
    """The column of the hardware, or one more if that holds another result of the build."""
    for index, column in enumerate(section.columns):
        if column == hardware and index not in build.rows:
            return index
    section.columns.append(hardware)
    return len(section.columns) - 1


def _place_not_run(section: Section, result: Result) -> None:
    for row in result["not_run"]:
        build = _build(section, row, "mlcgen")
        if row["target"] not in [column.target for column in section.columns]:
            section.columns.append(Hardware("compiled only", row["target"], ""))
        for index, column in enumerate(section.columns):
            if column.target == row["target"]:
                build.not_run.setdefault(index, row)


# What each reached


def _lines(section: Section, build: Build) -> list[Line]:
    rows = list(build.rows.values())
    measured = _shown(_measured(section.options), rows) or NOTHING
    known = _shown(KNOWN, [*rows, *build.not_run.values()])
    columns = [_column(section, build, index, measured, known) for index in range(len(section.columns))]
    names = [*measured, *known]
    return [Line(name, [cell for cell in cells if cell]) for name, *cells in zip(names, *columns, strict=True)]


def _shown(lines: Lines, rows: Sequence[Row]) -> Lines:
    """Those that have something to say of any row."""
    return {name: to_cell for name, to_cell in lines.items() if any(to_cell(row).text != ABSENT for row in rows)}


def _column(section: Section, build: Build, index: int, measured: Lines, known: Lines) -> list[Cell | None]:
    """A cell for each line, or one that says for several of them why there is no figure."""
    if index in build.rows:
        return [to_cell(build.rows[index]) for to_cell in (*measured.values(), *known.values())]
    if index in build.not_run:
        what, _, why = build.not_run[index]["reason"].partition(": ")
        return [*_tall(what, why, len(measured)), *(to_cell(build.not_run[index]) for to_cell in known.values())]
    is_compiled = build.engine != "mlcgen" or section.columns[index].target in build.targets
    return _tall("not measured" if is_compiled else "not compiled", "", len(measured) + len(known))


def _tall(text: str, note: str, rowspan: int) -> list[Cell | None]:
    return [Cell(text, None, note, rowspan), *[None] * (rowspan - 1)]


def _measured(options: Mapping[str, Any]) -> Lines:
    """The lines of what was measured."""
    return {
        f"prefill of {options['prompt']}, tokens/s": lambda row: _metric(row, "prefill_tokens_per_s"),
        "first token, ms": lambda row: _metric(row, "first_token_s", 1e3),
        f"decode of {options['tokens']}, tokens/s": lambda row: _metric(row, "decode_tokens_per_s"),
        f"{options['long_context']} cached, tokens/s": lambda row: _test(row, "long", "long_decode_tokens_per_s"),
        f"batch of {options['batch']}, tokens/s": lambda row: _test(row, "batch", "batch_decode_tokens_per_s"),
        "decode, GB/s": lambda row: _of_peak(row, "decode_bytes_per_s", "decode_peak_share", 1e-9),
        "prefill, TFLOP/s": lambda row: _of_peak(row, "prefill_flops_per_s", "prefill_peak_share", 1e-12),
        "weights streamed per step": lambda row: _bytes(_median(row, "streamed_bytes_per_step")),
        "weights streamed, GB/s": lambda row: _of_peak(row, "streamed_bytes_per_s", "link_share", 1e-9),
        "load, s": lambda row: _metric(row, "load_s"),
        "load to first token, s": lambda row: _metric(row, "load_to_first_token_s"),
        "peak memory of the process": lambda row: _bytes(_median(row, "peak_memory_bytes")),
        "perplexity": lambda row: _number(row["quality"].get("perplexity")),
        "KL divergence from the reference": lambda row: _number(row["quality"].get("kl_divergence")),
    }


def _test(row: Row, test: str, metric: str) -> Cell:
    why = row["skipped"].get(test)
    return Cell("skipped", note=why) if why is not None else _metric(row, metric)


def _metric(row: Row, metric: str, unit: float = 1.0) -> Cell:
    return _number(_median(row, metric), unit)


def _median(row: Row, metric: str) -> float | None:
    return row["metrics"][metric]["median"] if metric in row["metrics"] else None


def _number(value: float | None, unit: float = 1.0, note: str = "") -> Cell:
    return Cell(ABSENT) if value is None else Cell(figure(value * unit), value, note)


def _of_peak(row: Row, metric: str, share: str, unit: float) -> Cell:
    value, of_peak = row["achieved"].get(metric), row["achieved"].get(share)
    note = f"{of_peak:.0%} of {figure(value * unit / of_peak)}" if value and of_peak else ""
    return _number(value, unit, note)


def _bytes(value: float | None) -> Cell:
    return Cell(ABSENT) if value is None else Cell(format_bytes(value), value)


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


# Where nothing was measured, the line that says why.
NOTHING: Lines = {"speed": lambda row: Cell(ABSENT)}

# The lines of what is known without measuring.
KNOWN: Lines = {
    "weights": lambda row: _bytes(row["size"].get("weights_bytes")),
    "code": lambda row: _bytes(row["size"].get("code_bytes")),
    "versions": lambda row: Cell(_versions(row["versions"]) or ABSENT),
}


def figure(value: float) -> str:
    """Three digits, or all before the point: 1,234 and 12.3 and 0.0123."""
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"


# Charts


def _charts(section: Section, metric: str, share: str) -> list[Chart]:
    charts = []
    for index, hardware in enumerate(section.columns):
        rows = [(build.title, build.rows[index]) for build in section.builds if index in build.rows]
        bars = [_bar(name, row, metric, share) for name, row in rows if metric in row["metrics"]]
        if bars:
            charts.append(Chart(hardware, bars))
    return charts


def _bar(name: str, row: Row, metric: str, share: str) -> Bar:
    value, of_peak = row["metrics"][metric]["median"], row["achieved"].get(share)
    return Bar(name, figure(value), value, value / of_peak if of_peak else None)
