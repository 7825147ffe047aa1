"""Reading adapters: what their files mean, and what is refused."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlcgen.adapter_layout import AdapterLayout, AdapterLimits, ProjectionGroup
from mlcgen.errors import CheckpointError, MlcgenError, UnsupportedError
from mlcgen.runtime.peft import Matrices, read_adapter

from ..adapter_files import random_pairs, tensors_of, write_adapter

Q, K, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")
SHAPES = {Q: (20, 24), K: (8, 24), OUT: (24, 20)}
GROUPS = (ProjectionGroup((Q, K), 24, (20, 8)), ProjectionGroup((OUT,), 20, (24,)))


def layout(rank: int = 6, dtype: str = "float32") -> AdapterLayout:
    return AdapterLayout(AdapterLimits(rank, 2, dtype), GROUPS, ())


def products(matrices: Matrices, rank: int = 6) -> dict[str, np.ndarray]:
    """B A of each module, float32, as the kernels see it."""
    found = {}
    for group, (a, b) in zip(GROUPS, matrices, strict=True):
        rows, row = a.transpose(0, 2, 1).reshape(-1, group.in_features).astype(np.float32), 0
        columns = b.transpose(0, 2, 1).reshape(-1, rank).astype(np.float32)
        for part, (name, n) in enumerate(zip(group.projections, group.out_features, strict=True)):
            found[name] = columns[row : row + n] @ rows[part * rank : (part + 1) * rank]
            row += -(-n // 16) * 16
    return found


@pytest.mark.parametrize("rank", [1, 4, 6])
@pytest.mark.parametrize(("config", "scale"), [({}, lambda r: 16 / r), ({"use_rslora": True}, lambda r: 16 / r**0.5)])
def test_every_projection_with_its_scale(tmp_path: Path, rank: int, config: dict, scale) -> None:
    pairs = random_pairs(SHAPES, rank)
    found = products(read_adapter(write_adapter(tmp_path, pairs, **config), layout()))
    for module, (a, b) in pairs.items():
        np.testing.assert_allclose(found[module], b @ a * scale(rank), rtol=1e-5, atol=1e-6)


def test_a_projection_that_is_not_adapted_is_zeros(tmp_path: Path) -> None:
    found = products(read_adapter(write_adapter(tmp_path, random_pairs({K: SHAPES[K]}, 4)), layout()))
    assert found[K].any()
    assert not found[Q].any()
    assert not found[OUT].any()


def test_ranks_and_alphas_of_their_own(tmp_path: Path) -> None:
    pairs = {**random_pairs({Q: SHAPES[Q], K: SHAPES[K]}, 4), **random_pairs({OUT: SHAPES[OUT]}, 2)}
    config = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3.5}}
    found = products(read_adapter(write_adapter(tmp_path, pairs, **config), layout()))
    for module, scale in ((Q, 3.5 / 4), (K, 16 / 4), (OUT, 16 / 2)):
        a, b = pairs[module]
        np.testing.assert_allclose(found[module], b @ a * scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_files(tmp_path: Path, dtype: type) -> None:
    pairs = random_pairs(SHAPES, 4)
    narrow = {module: (a.astype(dtype), b.astype(dtype)) for module, (a, b) in pairs.items()}
    found = products(read_adapter(write_adapter(tmp_path, narrow), layout()))
    for module, (a, b) in narrow.items():
        np.testing.assert_allclose(found[module], b.astype("f4") @ a.astype("f4") * 4, rtol=1e-5, atol=1e-6)


def test_float16_storage(tmp_path: Path) -> None:
    pairs = random_pairs(SHAPES, 4)
    matrices = read_adapter(write_adapter(tmp_path, pairs), layout(dtype="float16"))
    assert {m.dtype for pair in matrices for m in pair} == {np.dtype(np.float16)}
    np.testing.assert_allclose(products(matrices)[Q], pairs[Q][1] @ pairs[Q][0] * 4, rtol=0.02, atol=0.02)


def refused(path: Path, error: type[MlcgenError], *words: str) -> None:
    with pytest.raises(error) as caught:
        read_adapter(path, layout())
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"use_dora": True}, UnsupportedError, ["use_dora", "plain LoRA"]),
        ({"use_qalora": True}, UnsupportedError, ["use_qalora"]),
        ({"bias": "lora_only"}, UnsupportedError, ["bias", "lora_only"]),
        ({"modules_to_save": ["lm_head"]}, UnsupportedError, ["modules_to_save", "lm_head"]),
        ({"init_lora_weights": "pissa_niter_16"}, UnsupportedError, ["init_lora_weights", "pissa"]),
        ({"peft_type": "IA3"}, UnsupportedError, ["peft_type", "IA3"]),
        ({"peft_type": None}, UnsupportedError, ["peft_type"]),
        ({"layer_replication": [[0, 4]]}, UnsupportedError, ["layer_replication"]),
        ({"r": 7}, UnsupportedError, ["rank 7", "--lora-rank 7"]),
        ({"r": 0}, CheckpointError, ["r is 0"]),
        ({"r": True}, CheckpointError, ["r is True"]),
        ({"r": 1 << 40}, CheckpointError, ["r is"]),
        ({"r": 3}, CheckpointError, ["shape (4, 24)", "not (3, 24)"]),
        ({"lora_alpha": "16"}, CheckpointError, ["lora_alpha"]),
        ({"lora_alpha": float("nan")}, CheckpointError, ["lora_alpha"]),
        ({"lora_alpha": 1e8}, CheckpointError, ["finite"]),
        ({"rank_pattern": {"q_proj": "many"}}, CheckpointError, ["rank_pattern"]),
        ({"rank_pattern": ["q_proj"]}, CheckpointError, ["rank_pattern"]),
        ({"alpha_pattern": {"(a+)+$": 3}}, UnsupportedError, ["alpha_pattern", "regular expression"]),
    ],
    ids=str,
)
def test_configs_that_are_refused(tmp_path: Path, config: dict, error: type[MlcgenError], words: list[str]) -> None:
    pairs = random_pairs({Q: SHAPES[Q]}, 4)
    if config.get("lora_alpha") == 1e8:  # beyond float16
        write_adapter(tmp_path, pairs, **{"alpha": 1e8})
        with pytest.raises(error, match="finite"):
            read_adapter(tmp_path, layout(dtype="float16"))
        return
    refused(write_adapter(tmp_path, pairs, **config), error, *words)


def test_files_that_are_missing_or_no_adapter(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", CheckpointError, "adapter_config.json")
    path = write_adapter(tmp_path / "a", random_pairs(SHAPES, 4))
    for text in ("[]", "{", "\xff", "[" * 100_000, " " * (1 << 21)):
        (path / "adapter_config.json").write_bytes(text.encode("latin-1"))
        refused(path, CheckpointError, "adapter_config.json")
    path = write_adapter(tmp_path / "b", random_pairs(SHAPES, 4))
    (path / "adapter_model.safetensors").unlink()
    refused(path, CheckpointError, "no weights")
    (path / "adapter_model.bin").write_bytes(b"pickle")
    refused(path, CheckpointError, "adapter_model.bin", "adapter_model.safetensors")


def changed(tmp_path: Path, change) -> Path:
    pairs = random_pairs(SHAPES, 4)
    path, tensors = write_adapter(tmp_path, pairs), tensors_of(pairs)
    save_file(change(tensors) or tensors, path / "adapter_model.safetensors")
    return path


A = f"base_model.model.{Q}.lora_A.weight"
A7 = A.replace("layers.0", "layers.7")
DORA, HEAD = f"base_model.model.{Q}.lora_magnitude_vector", "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.update({DORA: np.ones(20, "f4")}), UnsupportedError, ["magnitude"]),
        (lambda t: t.update({HEAD: np.ones((5, 24), "f4")}), UnsupportedError, ["lm_head"]),
        (lambda t: t.update({A7: t[A]}), UnsupportedError, ["layers.7", "k_proj, o_proj, q_proj"]),
        (lambda t: t.pop(A) is None, CheckpointError, ["lora_B", Q]),
        (lambda t: t.update({A: t[A][:, :-1].copy()}), CheckpointError, ["(4, 23)", "(4, 24)"]),
        (lambda t: t.update({A: t[A][:3].copy()}), CheckpointError, ["(3, 24)"]),
        (lambda t: t.update({A: t[A].reshape(-1)}), CheckpointError, ["(96,)"]),
        (lambda t: t.update({A: t[A].astype("f8")}), UnsupportedError, ["F64"]),
        (lambda t: t.update({A: np.full_like(t[A], np.nan)}), CheckpointError, ["finite"]),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(tmp_path: Path, change, error: type[MlcgenError], words: list[str]) -> None:
    refused(changed(tmp_path, lambda t: change(t) and None), error, *words)


def test_a_file_of_nothing(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, {}), CheckpointError, "no tensors")


def test_damaged_files(tmp_path: Path) -> None:
    """Every byte of the header changed, and every length: an error of ours, or an adapter."""
    path = write_adapter(tmp_path, random_pairs({K: SHAPES[K]}, 2))
    file = path / "adapter_model.safetensors"
    whole = file.read_bytes()
    for cut in range(0, len(whole), 37):
        file.write_bytes(whole[:cut])
        refused(path, CheckpointError)
    rng = np.random.default_rng(0)
    for at in range(0, 8 + int.from_bytes(whole[:8], "little"), 3):
        broken = bytearray(whole)
        broken[at] = int(rng.integers(256))
        file.write_bytes(broken)
        try:
            read_adapter(path, layout())
        except MlcgenError as error:
            assert re.search(r"adapter_model|weights", str(error))  # noqa: PT017


def test_any_json_is_a_config_or_an_error(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, random_pairs({K: SHAPES[K]}, 2))
    fields = json.loads((path / "adapter_config.json").read_text())
    for name in fields:
        for value in (None, -1, 0, 1e400, "x", [], {}, [[]], {"a": {}}, True):
            (path / "adapter_config.json").write_text(json.dumps({**fields, name: value}))
            try:
                read_adapter(path, layout())
            except (CheckpointError, UnsupportedError) as error:
                assert name in str(error) or "shape" in str(error)  # noqa: PT017
