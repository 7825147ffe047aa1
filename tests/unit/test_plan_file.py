"""Launch plans are read with suspicion: what `read_plan` returns can run, whatever the file held."""

import contextlib
import copy
import ctypes
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlcgen.adapter_layout import SLOTS
from mlcgen.errors import ArtifactError, DeviceError, MlcgenError
from mlcgen.runtime import plan_executor
from mlcgen.runtime.executor import AdaptedStepInput, StepInput
from mlcgen.runtime.plan import INPUTS, VERSION, check_adapted, check_fit, function_names, read_plan
from mlcgen.runtime.plan_executor import ADAPTED as PREFIX
from mlcgen.runtime.plan_executor import PlanExecutor


def launch(function: str, *args: list[Any], grid: Sequence[Any] = ("n", 1, 1), shared: Any = 0) -> dict[str, Any]:
    return {
        "function": function,
        "grid": list(grid),
        "block": 256,
        "args": list(args),
        "shared": shared,
        "overlaps": True,
    }


MAP = {
    "of": ["tensor", 1],
    "dtype": "float16",
    "dims": [64, ["*", "n", 2]],
    "strides": [128],
    "box": [64, 128],
    "swizzle": 3,
}
PLAN: dict[str, Any] = {
    "version": VERSION,
    "arch": "sm_90",
    "max_tokens_per_step": 8,
    "max_logit_rows": 2,
    "symbols": {"n": ["input_ids", 0], "blocks": ["block_table", 1]},
    "inputs": {name: {"shape": shape, "dtype": "int32"} for name, shape in INPUTS.items() if name != SLOTS},
    "weights": {
        "table": {"shape": [4, 32, 16], "dtype": "float16", "is_tiled": True},
        "norm": {"shape": [32], "dtype": "float32", "is_tiled": False},
    },
    "pages": {"layers": 1, "shape": [2, 1, 4, 32], "dtype": "uint16"},
    "storages": [8 * 32 * 4 + 16, 2 * 64 * 4],
    "constants": [{"dtype": "float32", "data": "AACAPw=="}],
    "tensors": [
        {"kind": "input", "name": "input_ids"},
        {"kind": "weights", "name": "table"},
        {"kind": "pages", "layer": 0},
        {"kind": "constant", "constant": 0},
        {"kind": "storage", "storage": 0, "offset": 16, "shape": ["n", 32], "dtype": "float32"},
        {"kind": "storage", "storage": 1, "offset": 0, "shape": ["rows", 64], "dtype": "float32"},
    ],
    "kernels": {
        "embed": [
            {
                "when": 1,
                "launches": [
                    launch("embed", ["tensor", 2], ["null", 0], ["int64", "n"], ["float32", 0.5], ["float32", 1])
                ],
            }
        ],
        "product": [
            {
                "when": ["and", "is_decode", ["<=", "m", 4]],
                "launches": [
                    launch("few", ["scratch", 16], ["counters", 0], ["int32", ["ceildiv", "longest", 16]], shared=64)
                ],
            },
            {
                "when": 1,
                "launches": [
                    launch("before", ["scratch", 0], grid=(1, ["+", "seqs", "blocks"], 1)),
                    launch("many", ["map", MAP], ["map", {**MAP, "of": ["scratch", ["*", "m", 2]]}], ["tensor", 1]),
                ],
            },
        ],
    },
    "steps": [["embed", [0, 1, 4], {}], ["product", [4, 2, 3, 5], {"m": ["max", "rows", 2]}]],
    "output": 5,
    "scratch": 64,
    "counters": 16,
    "module": "AAAA",
}
# The one of the same model with the path of adapters.
ADAPTED: dict[str, Any] = PLAN | {
    "inputs": PLAN["inputs"] | {SLOTS: {"shape": ["n"], "dtype": "int32"}},
    "adapters": {
        "lora_a_0": {"shape": [3, 1, 32, 16], "dtype": "float16"},
        "lora_b_0": {"shape": [3, 2, 8, 16], "dtype": "float16"},
    },
    "storages": [8 * 32 * 4 + 16, 2 * 64 * 4, 64],
    "tensors": [*PLAN["tensors"], {"kind": "adapters", "name": "lora_a_0"}, {"kind": "input", "name": SLOTS}],
    "steps": [["embed", [0, 1, 6], {}], PLAN["steps"][1]],
}
MANIFEST: dict[str, Any] = {
    "model": {"vocab_size": 64},
    "kv": {"num_layers": 1, "num_kv_heads": 1, "head_dim": 32, "page_size": 4, "dtype": "bfloat16"},
    "entry": {"weights": ["table", "norm"]},
    "max_batch": 2,
    "context_length": 8,
    "adapters": {
        "rank": 8,
        "slots": 3,
        "dtype": "float16",
        "groups": [{"projections": ["q"], "in_features": 32, "out_features": [20]}],
        "arguments": [],
    },
}


def written(folder: Path, plan: Any) -> Path:
    file = folder / "cuda.plan"
    file.write_text(plan if isinstance(plan, str) else json.dumps(plan), encoding="utf-8")
    return file


def changed(where: str, value: Any, plan: dict[str, Any] = PLAN) -> dict[str, Any]:
    """The plan with what stands at a.b.0.c set, or removed for `...`."""
    plan = copy.deepcopy(plan)
    *parents, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    at: Any = plan
    for key in parents:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return plan


def refused(folder: Path, plan: Any) -> str:
    """The message with which a plan is refused."""
    file = written(folder, plan)
    with pytest.raises(ArtifactError) as caught:
        read_plan(file)
    message = str(caught.value)
    assert message.startswith(f"cannot read the launch plan {file}: ")
    assert message.count("compile the model again") == 1
    assert len(message) < 600
    assert "\n" not in message
    return message


def nested(depth: int) -> Any:
    size: Any = "n"
    for _ in range(depth):
        size = ["+", size, 1]
    return size


class Device:
    """Takes what an executor asks of a device, and runs nothing."""

    symbols: dict[str, int] = {}  # noqa: RUF012
    largest_binding = 1 << 48

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.allocated: list[tuple[str, int]] = []

    def allocate(self, num_bytes: int, purpose: str) -> int:
        assert num_bytes >= 0
        self.allocated.append((purpose, num_bytes))
        if num_bytes > 1 << 30:
            raise DeviceError(f"no room for {purpose}")
        return 1 << 20

    def pinned(self, num_bytes: int) -> np.ndarray:
        return np.zeros(max(num_bytes, 16), np.uint8)

    def launch(
        self, name: str, grid: Sequence[int], block: int, shared: int, args: Sequence[Any], overlaps: bool = False
    ) -> None:
        assert len(grid) == 3
        assert all(ctypes.addressof(arg) for arg in args)
        self.launched.append(name)

    def tensor_map(self, address: int, dtype: str, *sizes: Any) -> Any:
        dims, strides, box, _ = sizes
        assert len(dims) == len(box) == len(strides) + 1
        return ctypes.create_string_buffer(128)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Any]:
        yield self

    def free(self, address: int) -> None: ...
    def launch_graph(self, graph: Any) -> None: ...
    def mark(self, which: int) -> None: ...
    def wait(self, which: int) -> None: ...
    def synchronize(self) -> None: ...
    def upload(self, to: int, array: np.ndarray) -> None: ...
    def download(self, to: np.ndarray, source: int) -> None: ...


def executor_of(plan: dict[str, Any], device: Device) -> PlanExecutor:
    return PlanExecutor(device, plan, MANIFEST, dict.fromkeys(plan["weights"], 1 << 20), 2)  # type: ignore[arg-type]


def run(plan: dict[str, Any]) -> list[str]:
    """Start a prompt of 3 tokens, then one token more; returns what was launched."""
    device = Device()
    executor = executor_of(plan, device)
    for tokens in (3, 1):
        arrays = [np.zeros(size, np.int32) for size in (tokens, tokens, tokens, (1, 2), 1, 2, 1)]
        executor.step(StepInput(*arrays))
    return device.launched


def test_a_plan_of_a_version_before_trees(tmp_path: Path) -> None:
    inputs = {name: spec for name, spec in PLAN["inputs"].items() if name != "tree_masks"}
    plan = read_plan(written(tmp_path, PLAN | {"inputs": inputs}))
    assert run(plan) == run(PLAN)
    assert [executor_of(each, Device()).supports_trees for each in (plan, PLAN)] == [False, True]
    with pytest.raises(ArtifactError, match=r"inputs\.tree_masks is missing or no object"):
        read_plan(written(tmp_path, PLAN | {"inputs": inputs | {"tree_masks": None}}))


def test_a_plan(tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path, PLAN))
    assert plan == PLAN
    assert function_names(plan) == ["before", "embed", "few", "many"]
    assert run(plan) == ["embed", "before", "many", *2 * ["embed", "few"]]  # the second time recorded


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("version", ..., "of version None, this mlcgen reads 2"),
        ("version", 1, "of version 1"),
        ("version", True, "of version True"),
        ("module", "A$==", "module is 'A$==', which is no base64"),
        ("module", "", "module is '', which is no base64"),
        ("storages.0", -1, "storages[0] is -1, no number that can be"),
        ("storages.0", 1e9, "storages[0] is 1000000000.0"),
        ("storages", {}, "storages is missing or no list"),
        ("scratch", ..., "scratch is missing"),
        ("output", 6, "output is 6"),
        ("output", 0, "output is 0, which is no tensor that a step computes"),
        ("inputs.seq_lens.shape", ["n"], "inputs.seq_lens is of a shape that no step has"),
        ("inputs.more", {"shape": ["n"], "dtype": "int32"}, "inputs.more is of a shape"),
        ("inputs.input_ids.dtype", "int64", "inputs.input_ids.dtype is 'int64', none of int32"),
        ("weights.norm.is_tiled", True, "weights.norm is not of a shape that has tiles"),
        ("weights.table.dtype", "uint8", "weights.table is not of a shape that has tiles"),
        ("weights.norm.shape", [1 << 30, 1 << 30], "norm is larger than any memory"),
        ("weights.norm.shape.0", 0, "weights.norm.shape[0] is 0"),
        ("pages.shape", [2, 1, 4], "pages.shape has 3 items, not 4"),
        ("pages.shape", [1 << 30, 1 << 30, 1, 1], "pages is larger than any memory"),
        ("constants.0.data", "A", "constants[0].data is 'A', which is no base64"),
        ("tensors.0.kind", "nothing", "tensors[0] is missing or of no known kind; have: storage, input"),
        ("tensors.0.name", "logit_row", "tensors[0].name is 'logit_row'"),
        ("inputs.input_ids", ..., "inputs.input_ids is missing or no object"),
        ("tensors.1.name", "no", "tensors[1] names 'no', which is not among the weights"),
        ("tensors.2.layer", 1, "tensors[2] is of a layer that there is not"),
        ("tensors.3.constant", 1, "tensors[3] is a constant that there is not"),
        ("tensors.4.storage", 2, "tensors[4] lies in a storage that there is not"),
        ("tensors.4.offset", 20, "tensors[4] of shape ['n', 32] reaches beyond its storage"),
        ("max_tokens_per_step", 9, "tensors[4] of shape ['n', 32] reaches beyond its storage"),
        ("max_logit_rows", 3, "tensors[5] of shape ['rows', 64] reaches beyond its storage"),
        ("max_logit_rows", 0, "max_logit_rows is 0"),
        ("tensors.4.shape", [["-", "n", 9], 1], "tensors[4] of shape"),
        ("tensors.4.shape", [["//", "n", 0], 1], "the size ['//', 'n', 0] cannot be computed"),
        ("tensors.4.shape", ["m", 32], "the size 'm' cannot be computed"),
        ("kernels.embed", [], "kernels.embed has no variant"),
        ("kernels.embed.0.when", ["**", 1, 1], "kernels.embed[0].when is ['**', 1, 1], which is no size"),
        ("kernels.embed.0.launches.0.block", 1025, "block is 1025"),
        ("kernels.embed.0.launches.0.grid", ["n", 1], "grid has 2 items, not 3"),
        ("kernels.embed.0.launches.0.grid.0", "m", "steps[0] has no value for the symbol 'm'"),
        ("kernels.embed.0.launches.0.shared", 1.5, "shared is 1.5"),
        ("kernels.embed.0.launches.0.function", "a b", "function is 'a b', which is no name"),
        ("kernels.embed.0.launches.0.overlaps", 1, "overlaps is missing or no bool"),
        ("kernels.embed.0.launches.0.args.0", ["tensor", 3], "steps[0] gives 3 tensors to a kernel that reads 4"),
        ("kernels.embed.0.launches.0.args.0", ["address", 3], "args[0] is missing or of no known kind"),
        ("kernels.embed.0.launches.0.args.0", [], "args[0] is missing or of no known kind"),
        ("kernels.embed.0.launches.0.args.0", "tensor", "args[0] is missing or of no known kind"),
        ("kernels.embed.0.launches.0.args.3.1", 1e39, "args[3][1] is 1e+39, which is no number"),
        ("kernels.embed.0.launches.0.args.3.1", 10**400, "which is no number"),
        ("kernels.product.0.launches.0.args.0.1", 65, "steps[1] uses more scratch memory"),
        ("kernels.product.0.launches.0.args.0.1", -1, "steps[1] uses more scratch memory"),
        ("kernels.product.1.launches.1.args.0.1.of", ["counters", 0], "of is missing or of no known kind"),
        ("kernels.product.1.launches.1.args.0.1.of", ["tensor", 4], "steps[1] gives 4 tensors to a kernel"),
        ("kernels.product.1.launches.1.args.1.1.of", ["scratch", 65], "steps[1] uses more scratch memory"),
        ("kernels.product.1.launches.1.args.0.1.strides", [], "a map of 2 dims, 0 strides, 2 box"),
        ("kernels.product.1.launches.1.args.0.1.box", [64], "a map of 2 dims, 1 strides, 1 box"),
        ("kernels.product.1.launches.1.args.0.1.box.0", 257, "box[0] is 257"),
        ("kernels.product.1.launches.1.args.0.1.dtype", "int32", "dtype is 'int32', none of uint32"),
        ("kernels.product.1.launches.1.args.0.1.dims.1", "k", "steps[1] has no value for the symbol 'k'"),
        ("steps.1.0", "no", "steps[1] calls 'no', which is no kernel"),
        ("steps.1.1.0", 6, "steps[1] names a tensor that there is not"),
        ("steps.1.2", {}, "steps[1] has no value for the symbol 'm'"),
        ("steps.1.2.m", "m", "steps[1] has no value for the symbol 'm'"),
        ("steps.1", ["product", [4, 2, 3, 5]], "steps[1] has 2 items, not 3"),
    ],
)
def test_damage(tmp_path: Path, where: str, value: Any, says: str) -> None:
    assert says in refused(tmp_path, changed(where, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '{"version": 2}', "\x00", '{"version": 1e400}'])
def test_no_plan_at_all(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .* compile the model again"):
        read_plan(tmp_path / "none.plan")
    (tmp_path / "bytes.plan").write_bytes(b'{"version": 2, "arch": "\xff"}')
    with pytest.raises(ArtifactError, match=r"cannot read .* compile the model again"):
        read_plan(tmp_path / "bytes.plan")


def test_deep_nesting(tmp_path: Path) -> None:
    for depth in (65, 400):
        assert "which is no size" in refused(tmp_path, changed("kernels.embed.0.launches.0.shared", nested(depth)))
    for opened in ("[", '{"a":'):
        refused(tmp_path, opened * 100_000)
    text = json.dumps(changed("kernels.embed.0.when", "deep"))
    refused(tmp_path, text.replace('"deep"', '["+",' * 100_000 + "1" + ",1]" * 100_000))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-1"])
def test_numbers_that_are_none(tmp_path: Path, number: str) -> None:
    text = json.dumps(changed("output", "here"))
    refused(tmp_path, text.replace('"here"', number))


def paths(value: Any, where: str = "") -> Iterator[str]:
    """Where each part of the plan is, as `changed` takes it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield f"{where}{key}"
        yield from paths(part, f"{where}{key}.")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([1 << 31, 1 << 48, 1 << 63, -(1 << 63), 10**30, 10**400])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["n", "m", "+", "tensor", "scratch", "map", "storage", "input_ids", "product", "\ud800"])
    | st.text(max_size=3),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=5), part, max_size=3),
    max_leaves=6,
)
# A part of the plan at another place has the right shape and the wrong meaning.
places = st.sampled_from(sorted(paths(ADAPTED)))
damage = st.tuples(places, values | st.just(...) | places)


def part_at(where: str) -> Any:
    at: Any = ADAPTED
    for key in where.split("."):
        at = at[int(key) if key.isdigit() else key]
    return at


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage, st.booleans())
def test_any_damage_is_harmless_or_refused(tmp_path: Path, damaged: tuple[str, Any], is_moved: bool) -> None:
    where, value = damaged
    if isinstance(value, str) and is_moved and value in set(paths(ADAPTED)):
        value = part_at(value)
    plan = changed(where, value, ADAPTED)
    file = tmp_path / "cuda.plan"
    file.write_text(json.dumps(plan))
    try:
        found = read_plan(file)
    except ArtifactError as error:
        assert "compile the model again" in str(error)  # noqa: PT017
        return
    assert found == plan
    with contextlib.suppress(MlcgenError):  # too little memory, a size that cannot be computed for this step
        run(found)


def test_a_step_of_few_tokens_is_recorded_when_its_size_comes_again() -> None:
    """Rounded up: 3 and 4 tokens are one size, 5 another."""
    device = Device()
    executor = executor_of(PLAN, device)
    launched = []
    for tokens in (3, 5, 4, 3, 4, 5):
        before = len(device.launched)
        arrays = [np.ones(size, np.int32) for size in (tokens, tokens, tokens, (1, 2), 1, 2, 1)]
        executor.step(StepInput(*arrays))
        launched.append(len(device.launched) - before)
    assert launched == [3, 3, 6, 0, 0, 6]  # the second time twice, once to be recorded
    step = executor.prepared(StepInput(*(np.ones(size, np.int32) for size in (3, 3, 3, (1, 2), 1, 2, 1))))
    assert step.host["slot_mapping"].tolist() == [1, 1, 1, -1]


def test_steps_are_kept_until_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_executor, "MOST_KEPT", 1)
    device = Device()
    executor = executor_of(PLAN, device)
    for tokens, count in ((3, 3), (3, 6), (3, 0), (5, 3), (5, 3), (5, 3), (3, 0)):
        before = len(device.launched)
        arrays = [np.zeros(size, np.int32) for size in (tokens, tokens, tokens, (1, 2), 1, 2, 1)]
        executor.step(StepInput(*arrays))
        assert len(device.launched) - before == count


def test_the_two_plans_of_an_artifact_with_adapters(tmp_path: Path) -> None:
    """A step with adapters runs the second plan's kernels on the same memory, of the larger need of both."""
    adapted = read_plan(written(tmp_path, ADAPTED))
    check_adapted(adapted, PLAN, MANIFEST)
    device = Device()
    weights = dict.fromkeys(PLAN["weights"], 1 << 20)
    executor = PlanExecutor(device, PLAN, MANIFEST, weights, 2, None, adapted)  # type: ignore[arg-type]
    assert executor.adapters is not None
    executor.write_adapter(2, [(np.zeros((1, 32, 16), np.float16), np.zeros((2, 8, 16), np.float16))])
    for tokens, slots in ((3, None), (3, [1, 0, -1]), (1, [2])):
        arrays = [np.zeros(size, np.int32) for size in (tokens, tokens, tokens, (1, 2), 1, 2, 1)]
        step = StepInput(*arrays)
        executor.step(step if slots is None else AdaptedStepInput(**vars(step), adapter_slots=np.array(slots)))
    kernels = ["embed", "before", "many"], ["embed", "few"]
    assert device.launched == [*kernels[0], *(PREFIX + name for name in (*kernels[0], *2 * kernels[1]))]
    for purpose, sizes in (("intermediate results", ADAPTED["storages"]), ("adapters", [3 * 32 * 32, 3 * 16 * 32])):
        assert [size for its_purpose, size in device.allocated if its_purpose == purpose] == sizes


def test_no_room_for_adapters(tmp_path: Path) -> None:
    adapted = changed("adapters.lora_a_0.shape.0", 1 << 21, ADAPTED)
    weights = dict.fromkeys(PLAN["weights"], 1 << 20)
    with pytest.raises(DeviceError, match="no room for adapters; or compile with fewer --adapters"):
        PlanExecutor(Device(), PLAN, MANIFEST, weights, 2, None, adapted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("adapters", ..., "tensors[6] names 'lora_a_0', which is not among the adapters"),
        ("adapters", [], "adapters is missing or no object"),
        ("adapters.lora_a_0", ..., "tensors[6] names 'lora_a_0', which is not among the adapters"),
        ("adapters.lora_a_0.shape.0", 0, "adapters.lora_a_0.shape[0] is 0"),
        ("adapters.lora_a_0.shape", [1 << 30, 1 << 30], "lora_a_0 is larger than any memory"),
        ("adapters.lora_a_0.dtype", "uint8", "adapters.lora_a_0.dtype is 'uint8', none of float32, float16"),
        ("tensors.6.name", 0, "tensors[6].name is missing or no str"),
        ("inputs.adapter_slots", ..., "tensors[7] names 'adapter_slots', which is not among the input"),
        ("inputs.adapter_slots.shape", ["seqs"], "inputs.adapter_slots is of a shape that no step has"),
    ],
)
def test_damage_of_a_plan_for_adapters(tmp_path: Path, where: str, value: Any, says: str) -> None:
    assert says in refused(tmp_path, changed(where, value, ADAPTED))


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("adapters.lora_a_0.shape.2", 31, "adapters"),
        ("adapters.lora_b_0.dtype", "float32", "adapters"),
        ("adapters.lora_b_0", ..., "adapters"),
        ("adapters.lora_a_1", {"shape": [1], "dtype": "float16"}, "adapters"),
        ("inputs.adapter_slots", ..., "inputs"),
        ("inputs.tree_masks", ..., "inputs"),
        ("weights.norm.shape.0", 31, "weights"),
        ("pages.shape.2", 16, "pages"),
        ("max_tokens_per_step", 16, "max tokens per step"),
        ("max_logit_rows", 4, "max logit rows"),
    ],
)
def test_plans_that_do_not_run_on_the_same_memory(where: str, value: Any, says: str) -> None:
    with pytest.raises(ArtifactError, match=f"the {says} of the launch plan for adapters do not fit; compile"):
        check_adapted(changed(where, value, ADAPTED), PLAN, MANIFEST)


def test_a_plan_for_adapters_in_the_other_ones_place() -> None:
    with pytest.raises(ArtifactError, match="the adapters of the launch plan for adapters do not fit"):
        check_adapted(ADAPTED, ADAPTED, MANIFEST)


WEIGHTS = {"table": np.zeros((4, 32, 16), np.float16), "norm": np.zeros(32, np.float32)}


def test_a_plan_fits_its_artifact() -> None:
    check_fit(PLAN, MANIFEST, WEIGHTS)
    check_fit(PLAN, MANIFEST, {**WEIGHTS, "of another target": np.zeros(1)})
    check_fit(PLAN, MANIFEST, None)


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("pages.layers", 2, "pages"),
        ("pages.dtype", "float16", "pages"),
        ("pages.shape.2", 16, "pages"),
        ("tensors.5.shape.1", 32, "logits"),
        ("tensors.5.dtype", "float16", "logits"),
        ("weights.norm", ..., "weights"),
        ("max_logit_rows", 1, "largest steps"),
        ("max_tokens_per_step", 1, "largest steps"),
    ],
)
def test_a_plan_of_another_artifact(where: str, value: Any, says: str) -> None:
    with pytest.raises(ArtifactError, match=f"the launch plan's {says} do not fit the manifest; compile"):
        check_fit(changed(where, value), MANIFEST, WEIGHTS)


@pytest.mark.parametrize("array", [np.zeros(33, np.float32), np.zeros((32, 1), np.float32), np.zeros(32, np.float16)])
def test_weights_of_another_shape(array: np.ndarray) -> None:
    with pytest.raises(ArtifactError, match=r"the tensor 'norm' is .* compile the model again"):
        check_fit(PLAN, MANIFEST, {**WEIGHTS, "norm": array})
