"""Is a compiled artifact right? Its logits against the un-optimised reference build of the same checkpoint.

The reference is the same Relax module without quantization, paging and fusion, in float32, by TVM's stock lowering.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from mlcgen import artifact, passes, weights
from mlcgen.checkpoint import Checkpoint, open_checkpoint
from mlcgen.compile_target import build_functions
from mlcgen.errors import ArtifactError
from mlcgen.models import parse_config
from mlcgen.models.layers import export
from mlcgen.passes.rewrite import FORWARD, static_shape
from mlcgen.runtime.executor import Executor, StepInput
from mlcgen.runtime.load import load_executor
from mlcgen.targets import resolve

Float32 = npt.NDArray[np.float32]
NUM_TOKENS = 32
TEXT = (
    "The capital of France is Paris. Water boils at 100 degrees Celsius at sea level. def add(a, b):\n"
    "    return a + b\nOnce upon a time there was a small village at the foot of a mountain."
)
# Largest mean KL divergence (nats) from the reference; float formats are held to their rounding.
KL_LIMITS = {"f32": 1e-5, "f16": 1e-4, "bf16": 1e-2, "q8": 1e-2, "gguf": 1e-2, "q4": 1.0}
# Activations of 8 bits are not meant to change what the weights already lost by much.
KL_LIMITS |= {f"{name}a8": max(KL_LIMITS[name], 2e-2) for name in ("q8", "gguf", "q4")}


def verify(
    path: str | Path,
    model: str | Path | None = None,
    target: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare an artifact with its reference on a fixed text; the result is returned and kept in the manifest.

    model: the checkpoint, where it is not the source that the manifest names. max_abs_logprob_error is over the 10
    most likely tokens of each position. Raises ArtifactError where the checkpoint cannot be named.
    """
    progress = progress or (lambda stage, done, total: None)
    manifest = artifact.read_manifest(path)
    source = model or manifest.get("source")
    if not source:
        raise ArtifactError(f"{path} does not say what it was made of; name the checkpoint with --model")
    progress("reference", 0, 2)
    loaded = load_executor(path, target=target, num_pages=-(-NUM_TOKENS // manifest["kv"]["page_size"]))
    token_ids = _token_ids(loaded.tokenizer_path, loaded.executor.vocab_size)
    expected = _log_softmax(reference_logits(open_checkpoint(source), token_ids))
    progress("artifact", 1, 2)
    actual = _log_softmax(executor_logits(loaded.executor, token_ids))
    result: dict[str, Any] = {**compare(expected, actual), "prompt_tokens": len(token_ids)}
    result["reference"] = "float32, unfused, unpaged"
    limit = KL_LIMITS[manifest["quantization"]]
    result |= {"quantization": manifest["quantization"], "target": loaded.target, "kl_limit": limit}
    result["passed"] = bool(result["kl_divergence"] <= limit)
    artifact.write_json(Path(path) / artifact.MANIFEST, {**manifest, "verify": result})
    progress("artifact", 2, 2)
    return result


def reference_logits(checkpoint: Checkpoint, token_ids: npt.NDArray[np.int32]) -> Float32:
    """(tokens, vocab) logits of the un-optimised build on this machine's CPU."""
    mod, names = export(parse_config(checkpoint.config))
    shapes = {name: static_shape(p) for name, p in zip(names, mod[FORWARD].params[2:], strict=True)}
    weights.check_parameters(checkpoint, shapes)
    mod = passes.run(mod, passes.reference_pipeline(), resolve("cpu"), lambda name, module: None)
    mod = relax.transform.BundleModelParams()(mod)
    vm = build_functions(mod, lambda name, module: None)
    read = weights.checkpoint_reader(checkpoint)
    positions = np.arange(len(token_ids), dtype=np.int32)
    inputs = [tvm.runtime.tensor(a) for a in (token_ids, positions)]
    logits = vm[FORWARD](*inputs, [tvm.runtime.tensor(read(name)) for name in names])
    return np.asarray(logits.numpy(), np.float32)


def executor_logits(executor: Executor, token_ids: npt.NDArray[np.int32]) -> Float32:
    """(tokens, vocab) logits of one sequence in one step, its pages in reverse order."""
    n = len(token_ids)
    pages = np.arange(-(-n // executor.page_size), dtype=np.int32)[::-1]
    positions = np.arange(n, dtype=np.int32)
    slots = pages[positions // executor.page_size] * executor.page_size + positions % executor.page_size
    lengths = np.array([n], np.int32)
    start = np.array([0, n], np.int32)
    batch = StepInput(token_ids, positions, slots, pages[None].copy(), lengths, start, positions)
    return executor.step(batch).copy()


def compare(expected: Float32, actual: Float32, likely: int = 10) -> dict[str, float]:
    """Two (tokens, vocab) tables of log probabilities."""
    top = np.argsort(-expected, axis=1)[:, :likely]
    error = np.take_along_axis(actual, top, 1) - np.take_along_axis(expected, top, 1)
    kl = (np.exp(expected.astype(np.float64)) * (expected - actual)).sum(1).mean()
    return {
        "max_abs_logprob_error": float(np.abs(error).max()),
        "kl_divergence": float(max(kl, 0.0)),
        "top1_agreement": float((expected.argmax(1) == actual.argmax(1)).mean()),
    }


def _log_softmax(logits: Float32) -> Float32:
    shifted = logits - logits.max(1, keepdims=True)
    result: Float32 = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _token_ids(tokenizer: Path | None, vocab_size: int) -> npt.NDArray[np.int32]:
    """The start of a fixed text, or of a fixed random sequence where there is no tokenizer."""
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, vocab_size, NUM_TOKENS, np.int32)
    import tokenizers

    encoded = tokenizers.Tokenizer.from_file(str(tokenizer)).encode(TEXT).ids
    return np.array(encoded[:NUM_TOKENS], np.int32)
