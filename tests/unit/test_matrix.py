"""Results read back, merged, and shown as a page. Nothing is measured, no figure is a measurement."""

import copy
import json
import shutil
import subprocess
from collections.abc import Mapping
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcgen.bench.matrix import Cell, page, sections
from mlcgen.bench.result import VERSION, merged, read_results
from mlcgen.cli import main
from mlcgen.errors import BenchError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = {"prompt": 512, "tokens": 128, "long_context": 4096, "batch": 8, "batch_prompt": 64, "repeat": 5}
MODEL = {"name": "small", "model_type": "llama", "hidden_size": 64, "num_layers": 2, "vocab_size": 100}
CPU_ONLY, BOTH = ["cpu"], ["cpu", "cuda:sm_90"]
NO_DRIVER = "compiled, not run: no NVIDIA driver (libcuda.so.1) is installed"


def summary(value: float) -> dict[str, Any]:
    return {"median": value, "min": value, "max": value, "samples": [value]}


def about(name: str, target: str | None, targets: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "target": target,
        "kind": "cuda" if target and target.startswith("cuda") else "cpu",
        "targets": targets,
        "quantization": "q4" if target else None,
        "size": {"weights_bytes": 1 << 20, "code_bytes": 1 << 10} if target else {},
        "quality": {"perplexity": 12.25} if target else {},
        "versions": {"mlcgen": "0.1.0"},
    }


def row(name: str, target: str | None, targets: list[str], decode: float, device: str) -> dict[str, Any]:
    metrics = {"prefill_tokens_per_s": decode * 20, "first_token_s": 0.25, "decode_tokens_per_s": decode}
    metrics |= {"batch_decode_tokens_per_s": decode * 4, "load_s": 1.5, "load_to_first_token_s": 1.75}
    achieved = {"decode_bytes_per_s": decode * 1e8, "decode_peak_share": 0.5}
    achieved |= {"prefill_flops_per_s": decode * 1e9, "prefill_peak_share": 0.25}
    return {
        **about(name, target, targets),
        "engine": "mlcgen" if target else name,
        "device": device,
        "metrics": {key: summary(value) for key, value in {**metrics, "peak_memory_bytes": 3e8}.items()},
        "achieved": achieved,
        "skipped": {"long": "its context of 128 is shorter than 4096"},
    }


def result(cpu: str, engines: list[dict[str, Any]], not_run: list[dict[str, Any]]) -> dict[str, Any]:
    peaks = {"bytes_per_s": {"1048576": summary(2e10)}, "ops_per_s": {"float32": summary(1e11)}}
    return {
        "version": VERSION,
        "command": "mlcgen bench dist/q4",
        "model": MODEL,
        "options": OPTIONS,
        "machine": {"cpu": cpu, "cores": 8, "threads": 4},
        "versions": {"python": "3.11.7", "mlcgen": "0.1.0"},
        "devices": {each["kind"]: {"name": each["device"], "peaks": peaks} for each in engines},
        "engines": engines,
        "not_run": not_run,
    }


def two_machines() -> list[dict[str, Any]]:
    """A CPU with a peer, and a GPU; one artifact for both, and one that only the first has."""
    cuda = {**about("dist/q4", "cuda:sm_90", BOTH), "reason": NO_DRIVER}
    old = {**about("dist/old", "cuda:sm_80", ["cpu", "cuda:sm_80"]), "reason": "compiled, not run: no driver"}
    on_cpu = [row("dist/q4", "cpu", BOTH, 11, "Zen"), row("dist/old", "cpu", ["cpu", "cuda:sm_80"], 7, "Zen")]
    first = result("Zen", [*on_cpu, row("llama.cpp", None, [], 9, "Zen")], [cuda, old])
    return [first, result("Xeon", [row("elsewhere/q4", "cuda:sm_90", BOTH, 800.5, "H100")], [])]


def cells(results: list[dict[str, Any]], build_title: str) -> dict[str, Cell]:
    """Column's device -> the decode cell of a build, or the one that is in its place."""
    (section,) = sections(results)
    build = next(each for each in section.builds if each.title == build_title)
    first, *others = section.lines(build)
    decode = next(iter(line.cells) for line in others if line.name.startswith("decode of"))
    found = [cell if cell.rowspan > 1 else next(decode) for cell in first.cells]
    return {f"{column.device} {column.target}": cell for column, cell in zip(section.columns, found, strict=True)}


def test_hardware_is_across_and_builds_are_down() -> None:
    results = two_machines()
    (section,) = sections(results)
    assert [(each.device, each.target) for each in section.columns] == [
        ("Zen", "cpu"),
        ("H100", "cuda:sm_90"),
        ("compiled only", "cuda:sm_80"),
    ]
    assert [each.title for each in section.builds] == ["q4", "old, q4", "llama.cpp"]
    assert cells(results, "q4") == {
        "Zen cpu": Cell("11", 11),
        "H100 cuda:sm_90": Cell("800", 800.5),
        "compiled only cuda:sm_80": Cell("not compiled", rowspan=14),
    }
    assert cells(results, "old, q4")["H100 cuda:sm_90"].text == "not compiled"
    assert cells(results, "old, q4")["compiled only cuda:sm_80"] == Cell("compiled, not run", None, "no driver", 11)
    assert cells(results, "llama.cpp")["H100 cuda:sm_90"].text == "not measured"


def test_a_target_that_ran_on_no_machine_or_on_another() -> None:
    first, second = two_machines()
    assert cells([first], "q4")["compiled only cuda:sm_90"] == Cell(
        "compiled, not run", None, "no NVIDIA driver (libcuda.so.1) is installed", 11
    )
    assert cells([first, second], "q4")["H100 cuda:sm_90"].value == 800.5
    assert cells([second, first], "q4")["H100 cuda:sm_90"].value == 800.5


def test_shares_are_of_the_devices_own_peak() -> None:
    (section,) = sections(two_machines())
    lines = {line.name: line.cells for line in section.lines(section.builds[0])}
    assert lines["decode, GB/s"] == [Cell("1.1", 11e8, "50% of 2.2"), Cell("80.1", 8.005e10, "50% of 160")]
    assert lines["4096 cached, tokens/s"][0] == Cell("skipped", note="its context of 128 is shorter than 4096")
    assert [(bar.value, bar.limit) for bar in section.charts["Decode, tokens/s"][1].bars] == [(800.5, 1601.0)]


def test_the_same_build_measured_twice_has_two_columns() -> None:
    first = two_machines()[0]
    again = copy.deepcopy(first)
    again["engines"][0]["metrics"]["decode_tokens_per_s"] = summary(10)
    (section,) = sections([first, again])
    assert [column.device for column in section.columns].count("Zen") == 2


def test_what_cannot_be_compared_is_apart() -> None:
    first, second = two_machines()
    second["options"] = {**OPTIONS, "prompt": 64}
    assert len(sections([first, second])) == 2
    second["options"], second["model"] = OPTIONS, {**MODEL, "num_layers": 3}
    assert len(sections([first, second])) == 2
    second["model"] = {**MODEL, "name": "another folder"}
    assert len(sections([first, second])) == 1


# Files


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_merging_a_merge_and_a_file_twice(tmp_path: Path) -> None:
    first, second = two_machines()
    a, b = write(tmp_path / "a.json", first), write(tmp_path / "b.json", second)
    assert read_results([a, b, a]) == [first, second]
    both = write(tmp_path / "both.json", merged([first, second]))
    assert read_results([both, b]) == [first, second]


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in two_machines()[0].items() if name != key}


def with_figure(value: Any) -> dict[str, Any]:
    changed = two_machines()[0]
    changed["engines"][0]["metrics"]["decode_tokens_per_s"]["median"] = value
    return changed


def with_devices(devices: Any) -> dict[str, Any]:
    return {**two_machines()[0], "devices": devices}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("1" * 5000, "is not JSON"),
        ("[]", "it has no version"),
        ({"schema_version": 2}, "it has no version"),
        ({**two_machines()[0], "version": 2}, "has version 2, this mlcgen reads 1"),
        ({**two_machines()[0], "version": True}, "has version True, this mlcgen reads 1"),
        ({"version": 2, "results": []}, "has version 2"),
        ({"version": 1, "results": [3]}, "it has no version"),
        ({"version": 1, "results": [{"version": 0}]}, "has version 0"),
        (without("engines"), "engines is missing or no list"),
        (without("devices"), "devices is missing or no object"),
        (with_figure("fast"), r"engines\[0\].metrics.decode_tokens_per_s.median is 'fast', which is no number"),
        (with_figure(float("nan")), "no number that can be"),
        (with_figure(float("inf")), "no number that can be"),
        (with_figure(-1), "no number that can be"),
        (with_figure(True), "no number that can be"),
        (with_figure(10**400), "no number that can be"),
        (with_devices({}), "devices has no cpu"),
        (
            with_devices({"cpu": {"name": "", "peaks": {"bytes_per_s": {"big": summary(1)}, "ops_per_s": {}}}}),
            "big is no number of bytes",
        ),
    ],
)
def test_a_file_that_is_no_result(content: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=f"bad.json .*{says}"):
        read_results([write(tmp_path / "bad.json", content)])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"missing\.json: No such file"):
        read_results([tmp_path / "missing.json"])
    with pytest.raises(BenchError, match="Is a directory"):
        read_results([tmp_path])
    (tmp_path / "latin").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(BenchError, match="latin is not JSON"):
        read_results([tmp_path / "latin"])


def test_the_verb_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(write(tmp_path / f"{i}.json", each)) for i, each in enumerate(two_machines())]
    out = ["--json", str(tmp_path / "all.json"), "--html", str(tmp_path / "all.html")]
    assert main(["bench", "--merge", *files, *out]) == 0
    assert read_results([tmp_path / "all.json"]) == two_machines()
    assert (tmp_path / "all.html").read_text() == page(two_machines())
    assert main(["bench", "--merge", *files]) == 2
    assert main(["bench", "--merge", str(tmp_path), "--html", str(tmp_path / "all.html")]) == 1
    assert "Is a directory" in capsys.readouterr().err


# The page


class Tags(HTMLParser):
    """The page's tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.figures: list[float] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs
        if tag == "data":
            self.figures.append(float(dict(attrs)["value"] or ""))

    def handle_data(self, data: str) -> None:
        self.text += data


def figures(results: list[dict[str, Any]]) -> set[float]:
    rows = [row for each in results for row in each["engines"]]
    medians = {summary["median"] for row in rows for summary in row["metrics"].values()}
    rates = {value for row in rows for name, value in row["achieved"].items() if name.endswith("per_s")}
    return medians | rates | {value for row in rows for kind in ("size", "quality") for value in row[kind].values()}


def test_every_figure_is_on_the_page() -> None:
    tags = Tags(page(two_machines()))
    assert figures(two_machines()) <= set(tags.figures)
    assert "no NVIDIA driver" in Tags(page(two_machines()[:1])).text


def test_the_page_asks_for_nothing() -> None:
    tags = Tags(page(two_machines()))
    assert not tags.names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not {name for name, _ in tags.attributes} & {"src", "href", "srcset", "xlink:href", "action"}
    assert "url(" not in page(two_machines())


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}'


def poisoned(value: Any) -> Any:
    """Every text replaced, every key but ours kept."""
    if isinstance(value, Mapping):
        return {key: poisoned(each) for key, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each) for each in value]
    return EVIL if isinstance(value, str) else value


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    evil = [poisoned(each) for each in two_machines()]
    for each in evil:
        peaks = next(iter(each["devices"].values()))["peaks"]
        each["devices"] = {EVIL: {"name": EVIL, "peaks": {**peaks, "ops_per_s": {EVIL: summary(1)}}}}
        each["versions"] = {EVIL: EVIL}
    results = read_results([write(tmp_path / "evil.json", merged(evil))])
    tags = Tags(page(results))
    assert "script" not in tags.names
    assert "img" not in tags.names
    assert not any(name.startswith("on") for name, _ in tags.attributes)
    assert EVIL in tags.text
    assert "49" not in tags.text.replace("149", "")


names = st.text(max_size=8)
amounts = st.floats(0, 1e30) | st.integers(0, 10**30)


@settings(max_examples=60, deadline=None)
@given(names, names, names, amounts, amounts, st.dictionaries(names, names, max_size=2))
def test_whatever_is_read_can_be_shown(
    name: str, target: str, device: str, value: float, share: float, skipped: dict[str, str]
) -> None:
    each = two_machines()[0]
    each["engines"][0] |= {"name": name, "target": target, "device": device, "skipped": skipped}
    each["engines"][0]["metrics"]["decode_tokens_per_s"] = summary(value)
    each["engines"][0]["achieved"] = {"decode_bytes_per_s": value, "decode_peak_share": share}
    each["not_run"][0]["target"] = target
    assert float(value) in Tags(page([each])).figures


# In a browser

PROBE = """<!doctype html><meta charset="utf-8"><style>body { margin: 0 }</style>
<iframe id="page" width="WIDTH" height="20000" style="border: 0"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const root = frame.contentDocument.documentElement;
  document.title = JSON.stringify({
    width: root.scrollWidth, client: root.clientWidth,
    text: frame.contentDocument.body.innerText,
    values: [...frame.contentDocument.querySelectorAll("data")].map(each => each.value),
  });
};
frame.srcdoc = PAGE;
</script>"""


def in_browser(html: str, width: int, tmp_path: Path) -> dict[str, Any]:
    """What Chromium makes of a page in a frame of that width (its own windows are 500 wide or more)."""
    page_text = json.dumps(html).replace("<", "\\u003c")
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", page_text))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dumped = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    title = dumped.partition("<title>")[2].partition("</title>")[0]
    return json.loads(unescape(title))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_every_figure_without_scrolling_the_page(width: int, tmp_path: Path) -> None:
    results = two_machines()
    results[0]["engines"][0]["name"] = "dist/" + "a-very-long-name-of-an-artifact" * 4
    seen = in_browser(page(results), width, tmp_path)
    assert seen["client"] == width
    assert seen["width"] <= width
    assert figures(results) <= set(map(float, seen["values"]))
    assert "compiled, not run" in seen["text"]
