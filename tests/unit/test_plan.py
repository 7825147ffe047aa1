from typing import Any

import pytest

from mlcgen.errors import MlcgenError
from mlcgen.models import parse_config
from mlcgen.models.config import DecoderConfig
from mlcgen.plan import Plan, kv_bytes_per_token, make_plan, weight_bytes

GIB = 1 << 30


def config(**changes: Any) -> DecoderConfig:
    smollm2 = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    return parse_config({**smollm2, **changes})


def plan(free: int, max_batch: int = 4, quantization: str = "q4") -> Plan:
    return make_plan("m", config(), quantization, GIB, 1 << 10, 1 << 20, max_batch, free)  # 1 GiB for each sequence


def test_parameter_count_of_a_known_model() -> None:
    assert weight_bytes(config(), "f32") == 4 * 134_515_008  # as SmolLM2-135M's model card says


def test_untied_head_is_counted() -> None:
    assert weight_bytes(config(tie_word_embeddings=False), "f32") - weight_bytes(config(), "f32") == 4 * 49152 * 576


def test_biases_are_counted_in_float32() -> None:
    qwen = config(model_type="qwen2")
    assert weight_bytes(qwen, "f16") - weight_bytes(config(), "f16") == 30 * 4 * (576 + 2 * 192)


@pytest.mark.parametrize(("quantization", "bits"), [("f16", 16), ("bf16", 16), ("q8", 8.5), ("q4", 4.5)])
def test_bits_per_weight(quantization: str, bits: float) -> None:
    norms, vocabulary = 61 * 576, 49152 * 576
    vocabulary_bits = 8.5 if quantization == "q4" else bits  # q4 keeps the vocabulary in 8 bits
    matrices = (134_515_008 - norms - vocabulary) * bits / 8 + vocabulary * vocabulary_bits / 8
    assert weight_bytes(config(), quantization) == matrices + 4 * norms


def test_rows_are_padded_to_whole_tiles() -> None:
    assert weight_bytes(config(vocab_size=49153), "f16") - weight_bytes(config(), "f16") == 16 * 576 * 2


def test_columns_that_make_no_whole_group_stay_f16() -> None:
    odd = config(intermediate_size=1544)
    assert weight_bytes(odd, "q4") > weight_bytes(config(), "q4") + 30 * 576 * 1544


def test_gguf_keeps_the_files_blocks() -> None:
    names = [f"model.layers.{i}.{part}" for i in range(30) for part in PROJECTIONS]
    stored = dict.fromkeys(names, "q4_1") | {"model.embed_tokens.weight": "q8_0"}
    embedding = 49152 * 576
    matrices = 134_515_008 - embedding - 61 * 576
    assert weight_bytes(config(), "gguf", stored) == embedding * 8.5 / 8 + matrices * 5 / 8 + 4 * 61 * 576


PROJECTIONS = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]


def test_gguf_needs_a_gguf_file() -> None:
    with pytest.raises(MlcgenError, match=r"\.gguf file"):
        weight_bytes(config(), "gguf")


def test_unknown_quantization_lists_the_known() -> None:
    with pytest.raises(MlcgenError, match=r"'q3'.*f32, f16, bf16, q8, q4, gguf"):
        weight_bytes(config(), "q3")


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 46080), ("float16", 23040), ("bfloat16", 23040)])
def test_kv_bytes_per_token(dtype: str, expected: int) -> None:
    assert kv_bytes_per_token(config(), dtype) == expected


@pytest.mark.parametrize(
    ("free", "verdict", "says"),
    [
        (6 * GIB, "fits", ""),
        (4 * GIB, "fits with paging", "2 whole sequences"),
        (2 * GIB, "does not fit", "--context-length"),
        (GIB, "does not fit", "smaller model"),
    ],
)
def test_verdict(free: int, verdict: str, says: str) -> None:
    result = plan(free)
    assert (result.verdict, result.fits) == (verdict, verdict != "does not fit")
    assert says in result.advice
    assert bool(says) == bool(result.advice)


def test_what_streaming_would_do() -> None:
    """Of 1 GiB, 30 layers of 27 MiB; with room for 20 layers beside the rest, two of them buffers, 12 are streamed."""
    layers = 1 - 49152 * 576 / 134_515_008
    each = int(GIB * layers) // 30
    workspace = plan(0).workspace_bytes
    advice = plan(GIB + workspace + GIB - 30 * each + 20 * each + 9999).advice
    assert f"--weight-memory {(GIB - 10 * each) >> 20}MiB streams {12 * each / GIB:.1f} GiB of layers" in advice
    assert advice.endswith(f"at most {1e9 / (12 * each):.2g} tokens/s per sequence for each GB/s of the link")
    assert "--weight-memory" not in plan(GIB + workspace + GIB - 29 * each).advice


def test_advice_to_quantize_only_where_it_helps() -> None:
    assert "-q q4" in plan(GIB, quantization="f32").advice
    assert "-q" not in plan(GIB, quantization="q4").advice


def test_advised_context_fits() -> None:
    tokens = int(plan(2 * GIB).advice.split()[1])
    assert make_plan("m", config(), "q4", GIB, 1 << 10, tokens, 1, 2 * GIB).verdict == "fits"
