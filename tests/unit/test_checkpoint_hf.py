"""Hugging Face directories: what the safetensors library writes is read back, and lying files are refused."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlcgen.checkpoint.hf import open_hf
from mlcgen.errors import CheckpointError, UnsupportedError

CONFIG = {"model_type": "llama", "hidden_size": 8}
RNG = np.random.default_rng(0)
TENSORS: dict[str, np.ndarray] = {
    "model.a.weight": RNG.normal(size=(4, 8)).astype(np.float32),
    "model.b.weight": RNG.normal(size=(8, 4)).astype(np.float16),
    "model.c.weight": RNG.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
    "model.c.bias": RNG.normal(size=(3,)).astype(np.float32),
}


def write_dir(path: Path, tensors: dict[str, np.ndarray] | None = None, config: dict[str, Any] | None = None) -> Path:
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    safetensors.numpy.save_file(TENSORS if tensors is None else tensors, path / "model.safetensors")
    return path


def write_shards(path: Path, **weight_map: str) -> Path:
    """Two shards; the index may be told to lie."""
    (path / "config.json").write_text(json.dumps(CONFIG))
    honest = {}
    for shard, names in (("one.safetensors", list(TENSORS)[:2]), ("two.safetensors", list(TENSORS)[2:])):
        safetensors.numpy.save_file({name: TENSORS[name] for name in names}, path / shard)
        honest |= dict.fromkeys(names, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**honest, **weight_map}}))
    return path


def check_tensors(path: Path) -> None:
    checkpoint = open_hf(path)
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, expected in TENSORS.items():
        values = checkpoint.read(name)
        assert checkpoint.tensors[name].shape == expected.shape
        assert checkpoint.tensors[name].dtype == str(expected.dtype)
        assert checkpoint.tensors[name].num_bytes == expected.nbytes
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values.astype(np.float32), expected.astype(np.float32))


def test_single_file(tmp_path: Path) -> None:
    check_tensors(write_dir(tmp_path))
    assert open_hf(tmp_path).name == tmp_path.name
    assert open_hf(tmp_path).config == CONFIG


def test_shards(tmp_path: Path) -> None:
    check_tensors(write_shards(tmp_path))


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    write_dir(tmp_path, {"empty": np.zeros((0, 4), np.float32), "scalar": np.array(2.5, np.float32)})
    checkpoint = open_hf(tmp_path)
    assert checkpoint.read("empty").shape == (0, 4)
    assert checkpoint.read("scalar") == 2.5


def test_integer_buffers_are_left_out(tmp_path: Path) -> None:
    write_dir(tmp_path, {"weight": np.ones((2, 2), np.float32), "position_ids": np.arange(4)})
    assert set(open_hf(tmp_path).tensors) == {"weight"}


def test_tokenizer_files_and_generation_config(tmp_path: Path) -> None:
    write_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "old"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    checkpoint = open_hf(tmp_path)
    assert checkpoint.tokenizer.tokenizer_json == b'{"version": "1.0"}'
    assert checkpoint.tokenizer.config == {"eos_token": "</s>", "chat_template": "old"}
    assert checkpoint.config["generation_eos_token_id"] == [2, 7]
    (tmp_path / "chat_template.jinja").write_text("new")
    assert open_hf(tmp_path).tokenizer.config["chat_template"] == "new"


def test_config_alone_is_enough_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    checkpoint = open_hf(tmp_path, weights=False)
    assert checkpoint.config == CONFIG
    assert checkpoint.tensors == {}
    with pytest.raises(CheckpointError, match="neither"):
        open_hf(tmp_path)


def test_missing_tensor_and_wrong_reader(tmp_path: Path) -> None:
    checkpoint = open_hf(write_dir(tmp_path))
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        checkpoint.read("nope")
    with pytest.raises(UnsupportedError, match="stored as float32, not in blocks"):
        checkpoint.read_grouped("model.a.weight")


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    checkpoint = open_hf(write_dir(tmp_path, {"w": np.ones((4, 4), np.float32)}))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="shorter"):
        checkpoint.read("w")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "JSON list, not an object"),
        ("config.json", "[" * 100000, "not JSON"),
        ("config.json", b"\xff{}", "not JSON"),
        ("tokenizer_config.json", "1", "JSON int"),
        ("generation_config.json", "nonsense", "not JSON"),
    ],
)
def test_bad_json(tmp_path: Path, name: str, content: str | bytes, problem: str) -> None:
    write_dir(tmp_path)
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=problem):
        open_hf(tmp_path)


def test_no_config_points_to_a_gguf_beside(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json; pass a Hugging Face"):
        open_hf(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"pass .*model\.gguf"):
        open_hf(tmp_path)


def test_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pickled weights.*convert"):
        open_hf(tmp_path)


def test_quantized_checkpoints_are_unsupported(tmp_path: Path) -> None:
    write_dir(tmp_path, config={**CONFIG, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(UnsupportedError, match="'gptq'"):
        open_hf(tmp_path)


@pytest.mark.parametrize(
    ("shard", "problem"),
    [
        ("../one.safetensors", "not a .safetensors beside it"),
        ("/etc/passwd", "not a .safetensors beside it"),
        ("..\\one.safetensors", "not a .safetensors beside it"),
        ("one.bin", "not a .safetensors beside it"),
        ("three.safetensors", "lacks 'three.safetensors'"),
        ("two.safetensors", "puts 'two.safetensors'"),
    ],
)
def test_lying_index(tmp_path: Path, shard: str, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        open_hf(write_shards(tmp_path, **{"model.a.weight": shard}))


def test_index_with_a_tensor_that_no_shard_has(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks 'model\.z\.weight'"):
        open_hf(write_shards(tmp_path, **{"model.z.weight": "one.safetensors"}))


def test_index_without_weight_map(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no 'weight_map'"):
        open_hf(tmp_path)


# --- hostile safetensors --------------------------------------------------------------------------------------------


def container(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": (b"", "header claims"),
    "absurd header length": (container({}, length=(1 << 64) - 1), "header claims"),
    "header past the end": (container({}, length=100), "header claims 100 bytes"),
    "not JSON": (container(b"nonsense"), "not JSON"),
    "not UTF-8": (container(b'{"\xff": 1}'), "not JSON"),
    "nested": (container(b"[" * 100000), "not JSON"),
    "a list": (container([]), "not a JSON object"),
    "duplicate key": (container(b'{"a": {}, "a": {}}'), "'a' occurs twice"),
    "entry not an object": (container({"a": 1}), "not described"),
    "unknown dtype": (container({"a": entry(0, 4, [1], "F7")}, bytes(4)), "unknown dtype 'F7'"),
    "dtype not text": (container({"a": entry(0, 4, [1], [])}, bytes(4)), "unknown dtype"),
    "negative shape": (container({"a": entry(0, 4, [-1, -1])}, bytes(4)), "impossible shape"),
    "shape not integers": (container({"a": entry(0, 4, [True])}, bytes(4)), "impossible shape"),
    "absurd rank": (container({"a": entry(0, 4, [1] * 99)}, bytes(4)), "impossible shape"),
    "missing offsets": (container({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "impossible data_offsets"),
    "reversed offsets": (container({"a": entry(4, 0, [1])}, bytes(4)), "not the size"),
    "size mismatch": (container({"a": entry(0, 4, [2])}, bytes(4)), "not the size of F32"),
    "overflowing shape": (container({"a": entry(0, 4, [1 << 62] * 4)}, bytes(4)), "not the size"),
    "past the end": (container({"a": entry(0, 8, [2])}, bytes(4)), "ends at byte"),
    "overlap": (container({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "overlaps"),
    "gap": (container({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "gap"),
    "bytes left over": (container({"a": entry(0, 4, [1])}, bytes(8)), "its tensors end at byte"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    content, problem = HOSTILE[case]
    write_dir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_hf(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_float8_is_unsupported(tmp_path: Path) -> None:
    write_dir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(container({"a": entry(0, 1, [1], "F8_E4M3")}, bytes(1)))
    with pytest.raises(UnsupportedError, match="F8_E4M3; have: F32, F16, BF16"):
        open_hf(tmp_path)


VALID = safetensors.numpy.save(TENSORS)
fuzz = settings(max_examples=200, deadline=3000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survive(path: Path, content: bytes) -> None:
    """Opening and reading may fail, but only with our errors."""
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").write_bytes(content)
    problem = ""
    try:
        checkpoint = open_hf(path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except (CheckpointError, UnsupportedError) as error:
        problem = str(error)
    assert "\n" not in problem


@fuzz
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(VALID)
    for at, value in flips:
        damaged[at] = value
    survive(tmp_path, bytes(damaged))


@fuzz
@given(st.integers(0, len(VALID) - 1))
def test_truncation(tmp_path: Path, length: int) -> None:
    write_dir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(VALID[:length])
    with pytest.raises(CheckpointError):
        open_hf(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 65) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "BOOL"]) | JSON, "shape": st.lists(st.integers(0, 3)) | JSON},
    optional={"data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2) | JSON},
)


@fuzz
@given(st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=3) | JSON, st.binary(max_size=32))
def test_random_headers(tmp_path: Path, header: object, data: bytes) -> None:
    survive(tmp_path, container(header, data))
