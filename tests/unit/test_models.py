"""Config fields and whole tiny models, against transformers."""

import json

import numpy as np
import pytest

from mlcgen import artifact
from mlcgen.compile import compile as compile_model
from mlcgen.errors import CheckpointError, UnsupportedError
from mlcgen.models import architectures, parse_config
from mlcgen.runtime.executor import StepInput
from mlcgen.runtime.load import load_executor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA = {"model_type": "llama", **SIZES}
QWEN2 = {"model_type": "qwen2", **SIZES}
MISTRAL = {"model_type": "mistral", **SIZES}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with every field": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn with a given factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    },
}


def hf_rope(scaling, theta):
    """transformers' inv_freq and attention factor."""
    config = transformers.LlamaConfig(**SIZES, rope_parameters={**scaling, "rope_theta": theta})
    if scaling["rope_type"] == "default":
        return transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy(), 1.0
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    inv_freq, factor = init(config, "cpu")
    return inv_freq.numpy(), factor


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", ROPES)
def test_rope_equals_transformers(name, theta):
    inv_freq, factor = hf_rope(ROPES[name], theta)
    old = {**LLAMA, "rope_theta": theta, "rope_scaling": ROPES[name]}
    new = {**LLAMA, "rope_parameters": {**ROPES[name], "rope_theta": theta}}
    for hf in (old, new):
        rope = parse_config(hf).rope
        np.testing.assert_allclose(rope.inv_freq, inv_freq, rtol=1e-5)
        assert rope.attention_factor == pytest.approx(factor)


def test_rope_by_its_old_names():
    old = parse_config({**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert old.rope == parse_config({**LLAMA, "rope_scaling": ROPES["linear"]}).rope
    assert parse_config({**LLAMA, "rope_scaling": None}).rope == parse_config(LLAMA).rope


def test_rope_divisors_of_gguf():
    factors = [1.0] * 4 + [8.0] * 4
    plain = parse_config(LLAMA).rope.inv_freq
    scaled = parse_config({**LLAMA, "rope_scaling": {"rope_type": "factors", "factors": factors}}).rope.inv_freq
    np.testing.assert_allclose(scaled, np.array(plain) / factors)
    with pytest.raises(CheckpointError, match="8 'factors'"):
        parse_config({**LLAMA, "rope_scaling": {"rope_type": "factors", "factors": [1.0]}})


def test_sizes_and_defaults():
    config = parse_config(LLAMA)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.tie_word_embeddings) == (False,) * 4
    assert parse_config({**LLAMA, "head_dim": 32}).q_size == 128
    without = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert parse_config(without).num_kv_heads == 4


def test_windows():
    assert parse_config(LLAMA).window == 0
    assert parse_config({**MISTRAL, "sliding_window": 8}).window == 8
    assert parse_config({**MISTRAL, "sliding_window": None}).window == 0
    assert parse_config(MISTRAL).window == transformers.MistralConfig().sliding_window
    with pytest.raises(CheckpointError, match="sliding_window"):
        parse_config({**MISTRAL, "sliding_window": "8"})


def test_biases():
    config = parse_config({**LLAMA, "attention_bias": True})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)
    assert parse_config({**LLAMA, "mlp_bias": True}).mlp_bias
    qwen2 = parse_config(QWEN2)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)


def test_unknown_architecture_names_the_known_ones():
    for model_type in ("foo", None, "layers"):
        with pytest.raises(UnsupportedError, match="have: llama, mistral, qwen2"):
            parse_config({**LLAMA, "model_type": model_type})
    assert architectures() == sorted(architectures())


@pytest.mark.parametrize(
    ("field", "value", "hf"),
    [
        ("hidden_act", "gelu", LLAMA),
        ("pretraining_tp", 2, LLAMA),
        ("rope_interleaved", True, LLAMA),
        ("partial_rotary_factor", 0.5, LLAMA),
        ("sliding_window", 4096, LLAMA),
        ("attention_bias", True, MISTRAL),
        ("logits_scaling", 8.0, LLAMA),
        ("use_sliding_window", True, QWEN2),
        ("layer_types", ["full_attention", "sliding_attention"], QWEN2),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, LLAMA),
        ("quantization_config", {"quant_method": "gptq"}, LLAMA),
    ],
)
def test_fields_that_would_change_the_result_are_refused(field, value, hf):
    with pytest.raises(UnsupportedError, match=field):
        parse_config({**hf, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("vocab_size", True),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("tie_word_embeddings", 1),
        ("rope_theta", -1.0),
        ("rope_scaling", ["linear"]),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_theta", 10**400),
        ("rms_norm_eps", 10**400),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}),
        ("rope_scaling", {"rope_type": "linear", "factor": 10**400}),
        ("rope_scaling", {"rope_type": "linear", "factor": 1e-299, "rope_theta": 1e-299}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}),
        ("rope_scaling", {"rope_type": "factors", "factors": [0.0] * 8}),
        ("rope_scaling", {"rope_type": "factors", "factors": ["1"] * 8}),
    ],
)
def test_fields_of_another_type_or_size_are_named(field, value):
    named = {"rope_scaling": "factor|rope_theta|object"}.get(field, field)
    with pytest.raises(CheckpointError, match=named):
        parse_config({**LLAMA, field: value})


def test_fields_that_say_nothing_are_accepted():
    parse_config({**LLAMA, "hidden_act": "silu", "use_cache": True, "sliding_window": None, "logits_scaling": 0})
    parse_config({**QWEN2, "sliding_window": 4096, "use_sliding_window": False, "layer_types": ["full_attention"] * 2})


MODELS = {
    "llama, untied, llama3 rope": ("Llama", {"rope": "llama3", "tie_word_embeddings": False}),
    "llama, tied, biases, wide heads": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 32,
            "rope": "linear",
            "vocab_size": 83,
        },
    ),
    "qwen2, untied, yarn rope": ("Qwen2", {"rope": "yarn", "tie_word_embeddings": False}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def hf_model(request):
    """A tiny model of transformers whose weights and biases all count."""
    name, fields = request.param
    fields = dict(fields)
    rope = {**ROPES[fields.pop("rope", "default")], "rope_theta": 10000.0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **fields}, rope_parameters=rope)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1) * 0.5)
    return model


def steps(tokens, page_size, pages):
    """A prompt in two chunks and then token by token, the pages in any order."""
    done, rng = 0, np.random.default_rng(0)
    table = rng.permutation(pages)[: -(-len(tokens) // page_size)]
    for count in (9, 14, 1, 1):
        positions = np.arange(done, done + count)
        slots = table[positions // page_size] * page_size + positions % page_size
        done += count
        arrays = [tokens[positions], positions, slots, table[None], [done], [0, count], np.arange(count)]
        yield StepInput(*(np.asarray(a, np.int32) for a in arrays))


def test_logits_equal_transformers(hf_model, tmp_path):
    source = tmp_path / "model"
    hf_model.save_pretrained(source)
    add_tokenizer(source, hf_model.config.vocab_size)
    path = compile_model(source, quantization="f32", output=tmp_path / "artifact")
    tokens = np.random.default_rng(1).integers(0, hf_model.config.vocab_size, 25).astype(np.int32)
    with torch.no_grad():
        wanted = hf_model(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    executor = load_executor(path, num_pages=5).executor
    found = np.concatenate([executor.step(step).copy() for step in steps(tokens, executor.page_size, 5)])
    assert np.abs(wanted).max() > 1  # says something
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_kernel_that_gives_nan_is_named(hf_model, tmp_path, monkeypatch):
    if hf_model.config.model_type != "qwen2":
        pytest.skip("one model is enough")
    source = tmp_path / "model"
    hf_model.save_pretrained(source)
    add_tokenizer(source, hf_model.config.vocab_size)
    path = compile_model(source, quantization="f32", output=tmp_path / "artifact")
    (step, *_) = steps(np.arange(25, dtype=np.int32), 16, 5)
    assert load_executor(path, num_pages=5).executor.first_not_finite(step) is None
    mapped = artifact.map_weights

    def poisoned(file):
        weights = dict(mapped(file))
        name = next(name for name in weights if "layers.1.mlp.down_proj" in name)
        weights[name] = aligned_copy(weights[name])
        weights[name].flat[3] = np.nan
        return weights

    monkeypatch.setattr(artifact, "map_weights", poisoned)
    executor = load_executor(path, num_pages=5).executor
    assert not np.isfinite(executor.step(step)).all()
    assert "with model.layers.1.mlp.down_proj.weight" in executor.first_not_finite(step)


def aligned_copy(array):
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def add_tokenizer(source, vocab_size):
    """One word per id."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0")).save(
        str(source / "tokenizer.json")
    )
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
