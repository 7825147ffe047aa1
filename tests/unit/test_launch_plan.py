"""Launch plans as the compiler writes them: complete, with room for every tensor, the same each time."""

import base64
import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlcgen
from mlcgen import artifact
from mlcgen.runtime.plan import ITEM_BYTES, VERSION, check_adapted, check_fit, function_names, read_plan
from mlcgen.runtime.sizes import evaluate
from mlcgen.targets import cuda_codegen
from mlcgen.targets.cuda_codegen import DEFINITION

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MAX_BATCH = 8
STEP_SYMBOLS = {"seqs": MAX_BATCH, "blocks": 16, "num_pages": 99, "is_decode": 0, "has_trees": 0, "longest": 256}
# Steps of a layer and its kernels' families, without what tells kernels apart.
LAYER = ["linear_norm", "rope_attention", "linear_residual", "linear_norm_swiglu", "linear_residual"]
ADAPTED_LAYER = [
    *("linear_norm", "low_rank_norm", "rope_attention", "linear_residual", "low_rank"),
    *("linear_norm", "low_rank_norm_swiglu", "linear_residual", "low_rank"),
]


def compiled(folder: Path, arch: str, quantization: str, **options: Any) -> Path:
    """An artifact whose machine code is its source."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_codegen, "compile_cuda", lambda source, arch: (source.encode(), ""))
        named = {"max_batch": MAX_BATCH, "kv_dtype": "float16", **options}
        return mlcgen.compile(model, [f"cuda:{arch}"], quantization, folder / "out", random_weights=True, **named)


def plan_file(path: Path) -> Path:
    (entry,) = artifact.read_manifest(path)["targets"]
    return artifact.check_hash(path, entry)


@pytest.fixture(scope="module", params=["sm_80 q4", "sm_80 bf16", "sm_90 q4", "sm_90 q8", "sm_90 f16"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("plan"), *request.param.split())


@pytest.fixture(scope="module")
def plan(path: Path) -> dict[str, Any]:
    return read_plan(plan_file(path))


def largest(plan: dict[str, Any]) -> dict[str, int]:
    return {**STEP_SYMBOLS, "n": plan["max_tokens_per_step"], "rows": plan["max_logit_rows"]}


def span(plan: dict[str, Any], tensor: int) -> tuple[int, int, int] | None:
    """(storage, first byte, end) of a tensor in the largest step, or None for what lies elsewhere."""
    spec = plan["tensors"][tensor]
    if spec["kind"] != "storage":
        return None
    num_bytes = prod(evaluate(size, largest(plan)) for size in spec["shape"]) * ITEM_BYTES[spec["dtype"]]
    return spec["storage"], spec["offset"], spec["offset"] + num_bytes


def overlap(a: tuple[int, int, int] | None, b: tuple[int, int, int] | None) -> bool:
    return a is not None and b is not None and a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def test_fits_its_artifact(path: Path, plan: dict[str, Any]) -> None:
    manifest = artifact.read_manifest(path)
    check_fit(plan, manifest, None)
    assert plan["version"] == VERSION
    assert list(plan["weights"]) == manifest["entry"]["weights"]
    assert sorted(plan["inputs"]) == sorted(manifest["entry"]["inputs"])
    assert plan["pages"] == {"layers": 3, "shape": [2, 2, 16, 64], "dtype": "float16"}
    assert plan["arch"] == manifest["targets"][0]["arch"]


def test_every_kernel_is_there_once_and_called(plan: dict[str, Any]) -> None:
    assert plan["kernels"].keys() == {name for name, _, _ in plan["steps"]}
    text = base64.b64decode(plan["module"]).decode()
    heads = [part.split("{")[0] for part in text.split(DEFINITION)[1:]]
    for name in function_names(plan):
        assert sum(f" {name}(" in head.replace("\n", " ") for head in heads) == 1, name


def test_the_last_variant_takes_any_step(plan: dict[str, Any]) -> None:
    for variants in plan["kernels"].values():
        assert variants[-1]["when"] == 1


def test_layers_are_five_steps_each(plan: dict[str, Any]) -> None:
    families = [name.rstrip("0123456789") for name, _, _ in plan["steps"]]
    found = [
        "_".join(w for w in name.split("_") if w not in ("q4", "q8", "f16", "bf16", "f", "bf")) for name in families
    ]
    first = found.index("linear_norm")
    assert found[first : first + 15] == 3 * LAYER
    assert found[first + 15 :] == ["take", "linear_norm"]


def test_symbols_of_calls(plan: dict[str, Any]) -> None:
    """The kernel of the logits calls the rows it is given n; all others are called with the step's own symbols."""
    *before, (name, _, own) = plan["steps"]
    assert name.startswith("linear")
    assert own == {"n": "rows"}
    assert [own for _, _, own in before] == len(before) * [{}]
    assert plan["symbols"] == {
        "n": ["input_ids", 0],
        "rows": ["logit_rows", 0],
        "seqs": ["block_table", 0],
        "blocks": ["block_table", 1],
    }


def test_the_logits_are_the_output(plan: dict[str, Any]) -> None:
    assert plan["steps"][-1][1][-1] == plan["output"]
    assert plan["tensors"][plan["output"]]["shape"] == ["rows", 300]
    assert plan["tensors"][plan["output"]]["dtype"] == "float32"


def test_storages_hold_their_tensors_and_no_more(plan: dict[str, Any]) -> None:
    ends = dict.fromkeys(range(len(plan["storages"])), 0)
    for tensor in range(len(plan["tensors"])):
        if (found := span(plan, tensor)) is not None:
            ends[found[0]] = max(ends[found[0]], found[2])
    assert list(ends.values()) == plan["storages"]


def test_nothing_is_overwritten_before_it_is_read(plan: dict[str, Any]) -> None:
    """Kernels write their last argument (and pages); none reads what it writes, as its blocks run in any order."""
    written: set[int] = set()  # tensors that hold what was written to them
    for name, tensors, _ in plan["steps"]:
        *inputs, output = tensors
        for tensor in inputs:
            assert span(plan, tensor) is None or tensor in written, (name, tensor)
            assert not overlap(span(plan, tensor), span(plan, output)), (name, tensor, output)
        written = {tensor for tensor in written if not overlap(span(plan, tensor), span(plan, output))} | {output}
    assert plan["output"] in written


def test_scratch_memory_holds_what_is_mapped(plan: dict[str, Any]) -> None:
    for name, _, own in plan["steps"]:
        symbols = largest(plan) | {symbol: evaluate(size, largest(plan)) for symbol, size in own.items()}
        launches = [launch for variant in plan["kernels"][name] for launch in variant["launches"]]
        for kind, value in (arg for launch in launches for arg in launch["args"]):
            if kind == "map" and value["of"][0] == "scratch":
                rows = evaluate(value["dims"][-1], symbols)
                end = evaluate(value["of"][1], symbols) + rows * value["strides"][-1]
                assert end <= plan["scratch"], (name, value)


def test_shared_memory_is_what_a_block_can_have(plan: dict[str, Any]) -> None:
    most = {"sm_80": 163, "sm_90": 227}[plan["arch"]] << 10
    for variants in plan["kernels"].values():
        for n in (1, 2, 4, 5, 16, 64, 128, 300, 2048):
            for is_decode in (0, 1):
                symbols = largest(plan) | {"n": n, "is_decode": is_decode}
                variant = next(v for v in variants if evaluate(v["when"], symbols))
                for launch in variant["launches"]:
                    assert evaluate(launch["shared"], symbols) <= most, launch["function"]
                    assert all(evaluate(size, symbols) >= 1 for size in launch["grid"])
                    assert launch["block"] % 32 == 0


def test_only_float_matrices_are_tiled(plan: dict[str, Any]) -> None:
    for name, spec in plan["weights"].items():
        is_matrix = any(part in name for part in ("_proj", "embed_tokens", "lm_head"))
        is_grouped = name.endswith((".w", ".scale", ".minimum"))  # codes and what belongs to them stay in tiles
        assert spec["is_tiled"] == (is_matrix and not is_grouped), name


def test_constants(plan: dict[str, Any]) -> None:
    """The angles' frequencies are the only one."""
    (constant,) = plan["constants"]
    found = np.frombuffer(base64.b64decode(constant["data"]), constant["dtype"])
    np.testing.assert_allclose(found, 500.0 ** (-np.arange(0, 64, 2) / 64), rtol=1e-6)


def test_the_same_each_time(tmp_path: Path) -> None:
    """Also in a process that orders sets differently."""
    first = plan_file(compiled(tmp_path, "sm_90", "q4")).read_bytes()
    assert plan_file(compiled(tmp_path, "sm_90", "q4")).read_bytes() == first
    script = f"""
import mlcgen
from mlcgen.targets import cuda_codegen
cuda_codegen.compile_cuda = lambda source, arch: (source.encode(), "")
options = dict(max_batch={MAX_BATCH}, kv_dtype="float16", random_weights=True)
mlcgen.compile({str(tmp_path / "model")!r}, ["cuda:sm_90"], "q4", {str(tmp_path / "other")!r}, **options)"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert plan_file(tmp_path / "other").read_bytes() == first


def test_a_second_plan_for_adapters(tmp_path: Path) -> None:
    """Beside the one that an artifact without them has, byte by byte; SwiGLU comes after the path of gate and up."""
    plain = plan_file(compiled(tmp_path, "sm_90", "q4")).read_bytes()
    path = compiled(tmp_path, "sm_90", "q4", lora_rank=5, adapters=3)
    assert plan_file(path).read_bytes() == plain
    manifest = artifact.read_manifest(path)
    entry = manifest["targets"][0]["adapted"]
    assert entry["file"] == "lib/cuda-sm_90.adapters.plan"
    adapted = read_plan(artifact.check_hash(path, entry))
    check_adapted(adapted, read_plan(plan_file(path)), manifest)
    names = [name.rstrip("0123456789") for name, _, _ in adapted["steps"]]
    names = [name.replace("_q4", "") for name in names]
    first = names.index("linear_norm")
    assert names[first : first + 3 * len(ADAPTED_LAYER)] == 3 * ADAPTED_LAYER
    read = [adapted["tensors"][i] for _, tensors, _ in adapted["steps"] for i in tensors]
    assert {tensor["name"] for tensor in read if tensor["kind"] == "adapters"} == set(adapted["adapters"])
    report = artifact.read_report(path)["cuda:sm_90"]
    assert any(line["name"].startswith("low_rank") for line in report["adapter_kernels"])
    assert not any(line["name"].startswith("low_rank") for line in report["kernels"])


def test_a_large_batch_has_a_row_of_logits_for_each(tmp_path: Path) -> None:
    plan = read_plan(plan_file(compiled(tmp_path, "sm_80", "f16", max_batch=1024)))
    assert plan["max_logit_rows"] == 1024
    end = span(plan, plan["output"])
    assert end is not None
    assert end[2] == 1024 * 300 * 4
