"""Adapters of a small model on the CPU, against the same model with their products merged into its weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tvm
from safetensors.numpy import save_file
from tvm import relax

import mlcgen
from mlcgen import passes
from mlcgen.compile_target import build_functions
from mlcgen.errors import RequestError, UnsupportedError
from mlcgen.models import parse_config
from mlcgen.models.layers import export
from mlcgen.passes.rewrite import FORWARD, static_shape
from mlcgen.runtime.executor import AdaptedStepInput, StepInput
from mlcgen.runtime.load import load_executor
from mlcgen.runtime.peft import read_adapter
from mlcgen.targets import resolve

from ..adapter_files import Pair, random_pairs, write_adapter

RANK = 5
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
Weights = dict[str, np.ndarray]
ALPHA = 6
# Adapter -> what it adapts: all, one of those that are computed together, and what stands alone.
KINDS = {"all": "proj", "some": ("q_proj", "up_proj"), "others": ("o_proj", "down_proj", "v_proj")}


class Model:
    """The checkpoint, its adapters, and the reference build, whose weights are arguments."""

    def __init__(self, root: Path) -> None:
        mod, self.names = export(parse_config(CONFIG))
        shapes = {n: static_shape(p) for n, p in zip(self.names, mod[FORWARD].params[2:], strict=True)}
        rng = np.random.default_rng(0)
        self.weights = {n: (rng.standard_normal(s) * 0.2).astype(np.float32) for n, s in shapes.items()}
        (root / "config.json").write_text(json.dumps(CONFIG))
        save_file(self.weights, root / "model.safetensors")
        mod = passes.run(mod, passes.reference_pipeline(), resolve("cpu"), lambda name, module: None)
        self._vm = build_functions(relax.transform.BundleModelParams()(mod), lambda name, module: None)
        self.pairs: dict[str, Mapping[str, Pair]] = {}
        self.paths: dict[str, Path] = {}
        modules = {n.removesuffix(".weight"): s for n, s in shapes.items() if n.endswith("_proj.weight")}
        for i, (name, kinds) in enumerate(KINDS.items()):
            its = {module: shape for module, shape in modules.items() if module.endswith(kinds)}
            self.pairs[name] = random_pairs(its, RANK - i, seed=i)
            self.paths[name] = write_adapter(root / name, self.pairs[name], ALPHA)

    def logits(self, ids: list[int], adapter: str | None) -> np.ndarray:
        weights = dict(self.weights)
        for module, (a, b) in self.pairs[adapter].items() if adapter else ():
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + b @ a * np.float32(ALPHA / len(a))
        inputs = [np.array(ids, np.int32), np.arange(len(ids), dtype=np.int32)]
        parameters = [tvm.runtime.tensor(weights[name]) for name in self.names]
        return self._vm[FORWARD](*map(tvm.runtime.tensor, inputs), parameters).numpy()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifact(model: Model) -> Path:
    root = model.paths["all"].parent
    return mlcgen.compile(root, ["cpu"], "f32", root / "artifact", page_size=4, lora_rank=RANK, adapters=3)


@pytest.fixture
def llm(artifact: Path) -> mlcgen.LLM:
    return mlcgen.LLM(artifact, num_pages=64)


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], length).tolist()


def step_input(prompts: list[list[int]], slots: list[int], page_size: int) -> AdaptedStepInput:
    """Whole prompts in one step, and the logits of each token."""
    lengths = [len(p) for p in prompts]
    blocks = -(-max(lengths) // page_size)
    table = np.arange(blocks * len(prompts), dtype=np.int32).reshape(-1, blocks)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    owner = np.repeat(np.arange(len(prompts)), lengths)
    total = sum(lengths)
    return AdaptedStepInput(
        np.concatenate(prompts).astype(np.int32),
        positions,
        (table[owner, positions // page_size] * page_size + positions % page_size).astype(np.int32),
        table,
        np.array(lengths, np.int32),
        np.cumsum([0, *lengths], dtype=np.int32),
        np.arange(total, dtype=np.int32),
        adapter_slots=np.repeat(np.array(slots, np.int32), lengths),
    )


def check(model: Model, executor, prompts: list[list[int]], names: list[str | None], slots: Mapping[str, int]) -> None:
    batch = step_input(prompts, [slots[name] if name else -1 for name in names], executor.page_size)
    rows = np.split(executor.step(batch), batch.query_start[1:-1])
    for ids, name, found in zip(prompts, names, rows, strict=True):
        wanted = model.logits(ids, name)
        assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_three_adapters_and_none_in_one_batch(model: Model, artifact: Path) -> None:
    executor = load_executor(artifact, num_pages=64).executor
    slots = {"others": 0, "all": 1, "some": 2}
    for name, slot in slots.items():
        executor.write_adapter(slot, read_adapter(model.paths[name], executor.adapters))
    names = ["all", None, "some", "others", "all"]
    check(model, executor, [prompt(n, n) for n in (5, 4, 1, 17, 30)], names, slots)
    check(model, executor, [prompt(1, i) for i in range(5)], names, slots)
    check(model, executor, [prompt(40, 0)], ["some"], slots)


def test_a_slot_is_used_again(model: Model, artifact: Path) -> None:
    executor = load_executor(artifact, num_pages=64).executor
    for name in ("all", "some", "others"):  # each leaves nothing of the one before
        executor.write_adapter(1, read_adapter(model.paths[name], executor.adapters))
        check(model, executor, [prompt(9, 1), prompt(3, 2)], [name, None], {name: 1})


def greedy(num: int = 12) -> mlcgen.SamplingParams:
    return mlcgen.SamplingParams(max_tokens=num, temperature=0, ignore_eos=True)


def expected_ids(model: Model, ids: list[int], adapter: str | None, num: int = 12) -> list[int]:
    tokens = list(ids)
    for _ in range(num):
        tokens.append(int(model.logits(tokens, adapter)[-1].argmax()))
    return tokens[len(ids) :]


def test_generation(model: Model, llm: mlcgen.LLM) -> None:
    for name, path in model.paths.items():
        llm.load_adapter(name, path)
    names = [None, "all", "some", "others", "all", None]
    prompts = [prompt(6 + i, 0) for i in range(6)]
    found = [out.token_ids for out in llm.generate(prompts, greedy(), names)]
    assert found == [expected_ids(model, p, name) for p, name in zip(prompts, names, strict=True)]
    assert len({tuple(ids) for ids in found}) > 3
    assert [d.token_ids for d in llm.stream(prompts[1], greedy(), "all")]
    assert llm.generate(prompts[1], greedy(), "all")[0].token_ids == found[1]


def test_prefixes_are_each_adapters_own(model: Model, llm: mlcgen.LLM) -> None:
    """A prompt's pages hold what one adapter computed: no other may find them, not even a later one of its name."""
    ids = prompt(20, 3)
    for kind in ("all", "some"):
        llm.load_adapter("it", model.paths[kind])
        for again in range(2):
            (out,) = llm.generate(ids, greedy(), "it")
            assert out.token_ids == expected_ids(model, ids, kind)
            assert out.metrics.num_cached_tokens == (19 if again else 0)
        llm.unload_adapter("it")
    assert llm.generate(ids, greedy())[0].token_ids == expected_ids(model, ids, None)


def test_without_adapters_the_plain_function_runs(model: Model, artifact: Path, llm: mlcgen.LLM) -> None:
    executor = llm.engine.executor
    steps: list[type] = []
    run: Callable[[StepInput], np.ndarray] = executor.step

    def step(batch: StepInput) -> np.ndarray:
        steps.append(type(batch))
        return run(batch)

    executor.step = step
    llm.load_adapter("all", model.paths["all"])
    llm.generate([prompt(5, 0), prompt(7, 1)], greedy())
    assert set(steps) == {StepInput}
    llm.generate([prompt(5, 0), prompt(7, 1)], greedy(), ["all", None])
    assert AdaptedStepInput in steps


def test_the_plain_code_is_that_of_an_artifact_without_adapters(model: Model, artifact: Path, tmp_path: Path) -> None:
    plain = mlcgen.compile(artifact.parent, ["cpu"], "f32", tmp_path / "plain", page_size=4)
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (plain, artifact)]
    assert manifests[0]["targets"][0]["sha256"] == manifests[1]["targets"][0]["sha256"]
    assert "adapters" not in manifests[0]
    assert not list((plain / "lib").glob("*adapters*"))
    llm = mlcgen.LLM(plain)
    with pytest.raises(UnsupportedError, match="--lora-rank"):
        llm.load_adapter("all", model.paths["all"])


def test_loading_and_unloading(model: Model, llm: mlcgen.LLM) -> None:
    for name in ("a", "b", "c"):
        llm.load_adapter(name, model.paths["all"])
    with pytest.raises(RequestError, match=r"'b' is loaded"):
        llm.load_adapter("b", model.paths["all"])
    with pytest.raises(RequestError, match=r"3 adapters are loaded.*--adapters"):
        llm.load_adapter("d", model.paths["all"])
    output = llm.engine.add_request("r", prompt(5, 0), greedy(), adapter="b")
    llm.engine.step()
    with pytest.raises(RequestError, match="unfinished requests use adapter 'b'"):
        llm.unload_adapter("b")
    while not output.finished:
        llm.engine.step()
    llm.unload_adapter("b")
    with pytest.raises(RequestError, match="no adapter 'b' is loaded; have: a, c"):
        llm.unload_adapter("b")
    (out,) = llm.generate(prompt(5, 0), greedy(), "b")
    assert isinstance(out.error, RequestError)
    llm.load_adapter("d", model.paths["some"])
    assert llm.generate(prompt(5, 0), greedy(), "d")[0].error is None


def test_samples_and_preempted_sequences_keep_their_adapter(model: Model, artifact: Path) -> None:
    llm = mlcgen.LLM(artifact, num_pages=14, options=mlcgen.EngineOptions(speculation="ngram"))
    for name, path in model.paths.items():
        llm.load_adapter(name, path)
    names, prompts = ["all", "some", "others", None], [prompt(9, i) for i in range(4)]
    outputs = llm.generate(prompts, greedy(20), names)
    assert sum(out.metrics.num_preemptions for out in outputs) > 0
    assert [out.token_ids for out in outputs] == [
        expected_ids(model, p, name, 20) for p, name in zip(prompts, names, strict=True)
    ]
    params = mlcgen.SamplingParams(n=2, max_tokens=8, temperature=0, ignore_eos=True)
    (out,) = llm.generate(prompts[0], params, "all")
    assert [each.token_ids for each in out.outputs] == [expected_ids(model, prompts[0], "all", 8)] * 2


async def _live(engine: mlcgen.AsyncEngine, model: Model) -> list[int]:
    await engine.load_adapter("some", model.paths["some"])
    with pytest.raises(RequestError, match="is loaded"):
        await engine.load_adapter("some", model.paths["some"])
    output = await engine.generate(prompt(8, 2), greedy(), adapter="some")
    await engine.unload_adapter("some")
    with pytest.raises(RequestError, match="no adapter"):
        await engine.generate(prompt(8, 2), greedy(), adapter="some")
    return list(output.token_ids)


def test_async_engine(model: Model, artifact: Path) -> None:
    import asyncio

    with mlcgen.AsyncEngine(artifact, num_pages=64) as engine:
        assert asyncio.run(_live(engine, model)) == expected_ids(model, prompt(8, 2), "some")
