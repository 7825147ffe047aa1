"""Streaming text equals decoded text, stop strings cut exactly, hostile templates stay in their box."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlcgen.errors import ArtifactError, RequestError
from mlcgen.runtime.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer

CORPUS = ["The quick brown fox jumps over the lazy dog. Once upon a time, there was a model."] * 4
SPLIT_TEXTS = ["héllo wörld", "你好,世界", "👩‍👩‍👧‍👦 family", "🇩🇪🏳️‍🌈", "naïve 𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "a�b", " lead and trail ", ""]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """GPT-2's kind: every byte is a token, so that characters of several bytes come in pieces."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"], show_progress=False
    )
    hf.train_from_iterator(CORPUS, trainer)
    return saved(hf, tmp_path_factory.mktemp("byte_level"), {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}})


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's kind: pieces with a visible space, and bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz.,"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    hf.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf.add_special_tokens(["<s>", "</s>"])
    return saved(hf, tmp_path_factory.mktemp("byte_fallback"), {})


def saved(hf: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> Tokenizer:
    hf.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json", config)


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@pytest.mark.parametrize("text", SPLIT_TEXTS)
def test_streaming_equals_decoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text * 7, add_special_tokens=False)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == text * 7


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_characters="�", exclude_categories=["Cs"]), max_size=60))
@example("a" + "\U0001f600" * 40)
def test_streaming_any_text(byte_level: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, byte_fallback):
        ids = tokenizer.encode(text)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 330), max_size=120), st.booleans())
def test_streaming_any_tokens(byte_level: Tokenizer, ids: list[int], skip: bool) -> None:
    """Invalid UTF-8, special tokens and ids beyond the vocabulary included."""
    assert "".join(streamed(byte_level, ids, skip)) == byte_level.decode(ids, skip)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(259, 300), max_size=60), st.lists(st.integers(0, 2), max_size=4))
def test_spaces_survive_special_tokens(byte_fallback: Tokenizer, ids: list[int], special: list[int]) -> None:
    ids = ids[:30] + special + ids[30:]
    assert "".join(streamed(byte_fallback, ids)) == byte_fallback.decode(ids)


def test_no_piece_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    text = "日本語 👩‍🔬 é"
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_an_unfinished_character_is_flushed_as_decode_shows_it(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("ok 😀")[:-1]
    assert "".join(streamed(byte_level, ids)) == byte_level.decode(ids) == "ok �"


@pytest.mark.parametrize("flood", ["bytes", "special", "text"])
def test_the_window_stays_short(tokenizer: Tokenizer, flood: str) -> None:
    """Cost per token must not grow with the text, whatever the model emits."""
    lone = tokenizer.token_id("<0xE2>") or tokenizer.token_id("â") or 0
    token_id = {"bytes": lone, "special": 1, "text": tokenizer.encode("a")[-1]}[flood]
    decoder = IncrementalDecoder(tokenizer)
    for _ in range(500):
        decoder.push(token_id)
        assert len(decoder._window) <= 2 * decoder.SLIDE


def test_special_tokens_are_kept_on_demand(byte_level: Tokenizer) -> None:
    ids = [0, *byte_level.encode("hi"), 1]
    assert "".join(streamed(byte_level, ids)) == "hi"
    assert "".join(streamed(byte_level, ids, skip_special_tokens=False)) == "<bos>hi<eos>"


def test_special_tokens_by_name(byte_level: Tokenizer) -> None:
    assert byte_level.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}
    assert byte_level.eos_token_ids == [1]


def test_lone_surrogates_are_the_requests_error(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        byte_level.encode("bad \ud800 text")


def test_a_broken_file_is_the_artifacts_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="cannot read tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", {})


def matched(stops: list[str], pieces: list[str], include: bool = False) -> tuple[list[str], str | None]:
    matcher, given_out = StopMatcher(stops, include), []
    for piece in pieces:
        given_out.append(matcher.push(piece))
        if matcher.matched:
            return given_out, matcher.matched
    return [*given_out, matcher.flush()], None


def test_stop_string_across_pieces_is_held_back() -> None:
    assert matched(["</end>"], ["one <", "/e", "nd> two"]) == (["one ", "", ""], "</end>")
    assert matched(["</end>"], ["one <", "/e", "lse"]) == (["one ", "", "</else", ""], None)
    assert matched(["</end>"], ["one </"]) == (["one ", "</"], None)
    assert matched(["</end>"], ["one </", "end>x"], include=True) == (["one ", "</end>"], "</end>")


def test_the_earliest_stop_string_wins() -> None:
    assert matched(["world", "lo"], ["hello world"]) == (["hel"], "lo")


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_stop_matching_equals_a_search_as_the_text_grows(stops: list[str], pieces: list[str]) -> None:
    given_out, stop = matched(stops, pieces)
    text = ""
    for piece in pieces:
        text += piece
        starts = [text.find(s) for s in stops if s in text]
        if starts:
            assert stop is not None
            assert "".join(given_out) == text[: min(starts)]
            return
    assert stop is None
    assert "".join(given_out) == text


CHATML = (
    "{% for message in messages %}\n"
    "    {% if message['role'] not in ['system', 'user', 'assistant'] %}\n"
    "        {{ raise_exception('unknown role ' + message['role']) }}\n"
    "    {% endif %}\n"
    "{{ '<|' + message.role + '|>' + message.content | trim + eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELLO = [{"role": "user", "content": " Hello <b> & é "}]


def with_template(tokenizer: Tokenizer, template: Any, tmp_path: Path) -> Tokenizer:
    return saved(tokenizer._tokenizer, tmp_path, {"eos_token": "<eos>", "chat_template": template})


@pytest.fixture
def render(byte_level: Tokenizer, tmp_path: Path) -> Any:
    def render(template: Any, messages: Any = HELLO, **options: Any) -> str:
        return with_template(byte_level, template, tmp_path).render_chat(messages, **options)

    return render


def test_chat_template(render: Any) -> None:
    assert render(CHATML) == "<|user|>Hello <b> & é<eos>\n<|assistant|>"
    assert render(CHATML, add_generation_prompt=False) == "<|user|>Hello <b> & é<eos>\n"


def test_chat_is_encoded_without_further_special_tokens(byte_level: Tokenizer, tmp_path: Path) -> None:
    tokenizer = with_template(byte_level, "{{ messages[0].content }}{{ eos_token }}", tmp_path)
    assert tokenizer.encode_chat([{"role": "user", "content": "hi"}]) == [*tokenizer.encode("hi"), 1]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ {'b': 'é<', 'a': 1} | tojson }}", '{"b": "é<", "a": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}", "0True1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}", "a1"),
        ("{% for x in missing %}{{ x }}{% else %}none{% endfor %}", "none"),
        ("{% for i in [1, 2, 3] if i != 2 %}{{ i }}{% endfor %}", "13"),
        ("{% generation %}{{ 1 + 2 * 3 }}{% endgeneration %}", "7"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ enable_thinking }}", "False"),
        ("{{ '-' * 3 }}{{ messages[0]['content'].strip().split(' ')[0] }}", "---Hello"),
    ],
)
def test_what_templates_use(render: Any, template: str, expected: str) -> None:
    assert render(template, enable_thinking=False) == expected


def test_the_template_for_tools_is_chosen_by_name(render: Any) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    assert render(named) == "plain"
    assert render(named, tools=[{}]) == "1 tools"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refused"),
        ("{% if %}", "does not parse"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|refused"),
        ("{{ messages.append(1) }}", "unsafe|refused"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "refused"),
        ("{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}", "loop passes"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "loop passes"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 1000000000 }}", "not allowed"),
        ("{{ 9 ** 99999999 }}", "not allowed"),
        (
            "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "may not build",
        ),
        (
            "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ 'b' ~ ns.s %}{% endfor %}",
            "may not build",
        ),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_bad_templates_fail_that_request(render: Any, template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(template)


def test_the_bound_is_per_rendering(byte_level: Tokenizer, tmp_path: Path) -> None:
    tokenizer = with_template(byte_level, "{% for i in range(60000) %}{% endfor %}ok", tmp_path)
    assert [tokenizer.render_chat(HELLO) for _ in range(20)] == ["ok"] * 20


def test_no_template_says_so(byte_level: Tokenizer) -> None:
    assert not byte_level.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        byte_level.render_chat(HELLO)
