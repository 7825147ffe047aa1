"""The kernels of a Llama-like model compile for each GPU architecture, and what they need fits into registers."""

import base64
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest

from mlcgen import launch_plan as writer
from mlcgen import passes, weights
from mlcgen.models import parse_config
from mlcgen.models.layers import export
from mlcgen.nvrtc import INSTALL, compile_cuda, find_library, resources
from mlcgen.passes.lift_weights import lift_weights
from mlcgen.passes.paged_attention import KvLayout
from mlcgen.passes.rewrite import FORWARD, static_shape
from mlcgen.targets import cuda_codegen, resolve
from mlcgen.targets.cuda_codegen import DEFINITION

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
pytestmark = pytest.mark.skipif(find_library() is None, reason=f"needs NVRTC: {INSTALL}")

BOUNDS = {"n": 2048, "rows": 512, "seqs": 8}
MODELS = [("q4", 64), ("f16", 128)]  # quantization, head_dim
# sm_86 and sm_89 have the same kernels: a model each.
MODELS_OF = {**dict.fromkeys(ARCHS, MODELS), "sm_86": MODELS[:1], "sm_89": MODELS[1:]}
# (functions, architectures) -> (registers, bytes that do not fit them). What is not here stays below the 255 registers
# that a thread can have, and keeps everything in them.
FULL = {
    ("attention_prefill_.*_4_2_128$", "sm_"): (255, 4),
    ("attention_prefill_.*_4_2_64$", "sm_"): (255, 0),
    ("attention_prefill_.*_4_2_64$", "sm_90"): (255, 16),
    ("attention_prefill_.*_4_2_64$", "sm_100"): (255, 32),
    ("attention_prefill_.*_8_1_128$", "sm_100"): (255, 44),
    ("attention_prefill_.*_4_2_128_trees$", "sm_"): (255, 0),
    ("attention_prefill_.*_8_1_128_trees$", "sm_100"): (255, 4),
    ("linear_f16_.*_64$", "sm_100"): (255, 0),
}


def config(head_dim: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 512,  # with these sizes several matrices share their kernels
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 512 // head_dim,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def source(arch: str, quantization: str, head_dim: int, patch: pytest.MonkeyPatch) -> str:
    """The text that a model's launch plan is compiled from."""
    patch.setattr(cuda_codegen, "compile_cuda", lambda text, arch: (text.encode(), ""))
    model, target = parse_config(config(head_dim)), resolve(f"cuda:{arch}")
    mod, names = export(model)
    shapes = {name: static_shape(p) for name, p in zip(names, mod[FORWARD].params[2:], strict=True)}
    storage, _ = weights.storage_plan(quantization, shapes, dict.fromkeys(shapes, "float32"))
    options = passes.PassOptions(storage, KvLayout(model.num_kv_heads, head_dim, 16, "float16"), BOUNDS)

    def ignore(name: str, module: Any) -> None: ...

    lifted = lift_weights(passes.run(mod, passes.model_pipeline(target, options), target, ignore))
    lowered = passes.run(lifted.forward, passes.lowering_pipeline(target, BOUNDS), target, ignore)
    plan, _ = writer.launch_plan(lowered, target, lifted.weights, BOUNDS)
    return base64.b64decode(plan["module"]).decode()


def joined(sources: list[str]) -> str:
    """One text with each kernel once: reading the headers takes a good part of the time."""
    includes: dict[str, None] = {}
    kernels: dict[str, str] = {}
    for text in sources:
        head, *definitions = text.split(DEFINITION)
        includes |= dict.fromkeys(head.splitlines())
        heads = [re.sub(r"__\w+__\([^)]*\)", "", definition).split("(")[0] for definition in definitions]
        kernels |= {head.split()[-1]: text for head, text in zip(heads, definitions, strict=True)}
    return "\n".join([*includes, *(DEFINITION + text for text in kernels.values())])


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[tuple[bytes, str]]]]:
    """What NVRTC makes for each architecture that is tested, in two processes: it uses one core of each."""
    archs = [item.callspec.params["arch"] for item in request.session.items if item.path == request.path]
    with pytest.MonkeyPatch.context() as patch:
        texts = {arch: joined([source(arch, *model, patch) for model in MODELS_OF[arch]]) for arch in archs}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {arch: pool.submit(compile_cuda, text, arch) for arch, text in texts.items()}


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_into_registers(compiled: dict[str, Future[tuple[bytes, str]]], arch: str) -> None:
    cubin, log = compiled[arch].result()
    assert cubin.startswith(b"\x7fELF")
    found = resources(log)
    kinds = {"embedding_", "rope_append_", "attention_decode_", "attention_prefill_", "sample_rows", "untile_2"}
    q4 = {"linear_bulk_q4_", "gemm_float16_"} if arch == "sm_90" else {"linear_q4_"}
    kinds |= q4 if MODELS[0] in MODELS_OF[arch] else set()
    kinds |= {"linear_f16_" if arch != "sm_90" else "gemm_float16_"} if MODELS[1] in MODELS_OF[arch] else set()
    assert {kind for kind in kinds if any(name.startswith(kind) for name in found)} == kinds
    over = {}
    for name, used in found.items():
        allowed = [limit for (names, archs), limit in FULL.items() if re.search(names, name) and re.search(archs, arch)]
        registers, spills = max(allowed, default=(254, 0))
        if used["registers"] > registers or used["spill_bytes"] > spills:
            over[name] = used
    assert not over
