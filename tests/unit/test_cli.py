"""The command line with a tiny model behind it: the words of an alphabet, each followed by the next."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import mlcgen
from mlcgen import cli_output
from mlcgen.cli import main
from mlcgen.errors import CompileError
from mlcgen.runtime.executor import Float32, StepInput, Uint8

WORDS = [*"abcdefghij", "end"]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


class Alphabet:
    """Says the word after the last one, without a look at its pages."""

    num_pages, page_size, vocab_size, max_tokens_per_step, page_shape = 16, 4, len(WORDS), 64, (1, 64)
    supports_trees = False

    def step(self, batch: StepInput) -> Float32:
        return np.eye(self.vocab_size, dtype=np.float32)[(batch.input_ids[batch.logit_rows] + 1) % self.vocab_size] * 9

    def copy_page(self, source: int, to: int) -> None: ...
    def pinned(self, num_bytes: int) -> Uint8:
        return np.zeros(num_bytes, np.uint8)

    def read_pages(self, pages: Sequence[int], host: Uint8, places: Sequence[int]) -> None: ...
    def write_pages(self, pages: Sequence[int], host: Uint8, places: Sequence[int]) -> None: ...
    def synchronize(self) -> None: ...


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(name: str, **contents: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.fixture
def artifact(stub: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="end"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = SimpleNamespace(
        executor=Alphabet(),
        tokenizer_path=tmp_path / "tokenizer.json",
        tokenizer_config={"chat_template": TEMPLATE},
        eos_token_ids=[10],
        context_length=32,
        max_batch=4,
        window=0,
        keys=None,
    )
    stub("mlcgen.runtime.load", load_executor=lambda path, **options: loaded)
    monkeypatch.setattr("mlcgen.cli_output.chosen_target", lambda path: None)
    return "an-artifact"


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Puts another function in the place of mlcgen.compile."""
    return lambda function: monkeypatch.setitem(vars(mlcgen), "compile", function)


def fail_with(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any, **options: Any) -> Any:
        raise error

    return function


USAGE_ERRORS = [
    "",
    "nonsense",
    "compile",
    "compile m --page-size 257",
    "compile m --page-size 0",
    "compile m --max-batch 0",
    "compile m --no-such-option",
    "run",
    "run an-artifact",
    "run an-artifact prompt --max-tokens many",
    "run an-artifact prompt --logprobs 0",
    "run an-artifact prompt --logprobs 3",
    "eval an-artifact",
    "eval an-artifact --text a --ids b",
    "eval an-artifact --ids b --window 1",
    "inspect",
    "plan m --context-length -1",
]


@pytest.mark.parametrize("line", USAGE_ERRORS)
def test_usage_errors_are_one_line_and_exit_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    verb = line.split()[0] if line.startswith(("compile", "run", "eval", "inspect", "plan")) else ""
    assert captured.err.endswith(f"; see mlcgen {verb} --help\n".replace("  ", " "))


FAILURES = [
    (CompileError("no linker\nanywhere; install one"), "mlcgen: no linker anywhere; install one"),
    (KeyboardInterrupt(), "mlcgen: interrupted"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (ZeroDivisionError("oops"), "internal error, ZeroDivisionError: oops"),
]


@pytest.mark.parametrize(("error", "says"), FAILURES, ids=lambda value: type(value).__name__)
def test_failures_are_one_line_and_exit_1(error, says, no_compile, capsys: pytest.CaptureFixture[str]) -> None:
    no_compile(fail_with(error))
    assert main(["compile", "m"]) == 1
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("line", ["-v compile m", "compile m -v", "compile --verbose m"])
def test_verbose_shows_the_traceback(line: str, no_compile, capsys: pytest.CaptureFixture[str]) -> None:
    no_compile(fail_with(CompileError("no linker")))
    assert main(line.split()) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("mlcgen: no linker\n")


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("mlcgen: no model 'nowhere'")


def test_compile_passes_everything_on(no_compile, stub, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Any, Any]] = []

    def compile(*args: Any, **options: Any) -> Path:
        calls.append((args, options))
        options["progress"]("codegen", 1, 2)
        options["log"]("fuse_qkv 0.1 s")
        return Path("out")

    manifest = {"targets": [{"name": "cpu"}], "weights": [{"bytes": 2048}], "quantization": "q8"}
    report = {"cpu": {"kernels": [], "fallbacks": ["no tuned schedule for linear"]}}
    stub("mlcgen.artifact", read_manifest=lambda path: manifest, read_report=lambda path: report)
    no_compile(compile)
    line = "-v compile m -t cpu -t cpu:aarch64 -q q8 -o out --context-length 99 --max-batch 3 --kv-dtype float16"
    assert main([*line.split(), "--page-size", "1", "--dump-ir", "ir", "--random-weights"]) == 0
    ((args, options),) = calls
    assert args == ("m", ["cpu", "cpu:aarch64"], "q8", Path("out"))
    assert not {"progress", "log"} - set(options)
    assert {name: options[name] for name in ("context_length", "max_batch", "kv_dtype", "page_size")} == {
        "context_length": 99,
        "max_batch": 3,
        "kv_dtype": "float16",
        "page_size": 1,
    }
    assert (options["dump_ir"], options["random_weights"]) == (Path("ir"), True)
    captured = capsys.readouterr()
    assert captured.out == "out: q8 for cpu, 2.0 KiB of weights\n"
    assert "fuse_qkv 0.1 s" in captured.err
    assert "warning: cpu: no tuned schedule for linear" in captured.err


def test_run_streams_one_prompt(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", artifact, "a b", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.split() == ["c", "d", "e"]


def test_memory_for_weights(artifact: str, stub: Callable[..., None]) -> None:
    load, given = sys.modules["mlcgen.runtime.load"].load_executor, list[Any]()

    def noticing(path: Path, **options: Any) -> Any:
        given.append(options["weight_memory"])
        return load(path, **options)

    stub("mlcgen.runtime.load", load_executor=noticing)
    assert main(["run", artifact, "a", "--max-tokens", "1", "--weight-memory", "1.5GiB"]) == 0
    assert main(["run", artifact, "a", "--max-tokens", "1"]) == 0
    assert given == ["1.5GiB", None]


def test_which_target_was_taken(stub: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    stub("mlcgen.artifact", read_manifest=lambda path: {"targets": ["cpu", "vulkan", "cuda:sm_90"]})
    reasons = {"vulkan": "a GPU in software", "cuda:sm_90": "no NVIDIA driver"}
    stub("mlcgen.runtime.target_choice", choose_target=lambda *_: {"name": "cpu"}, not_taken=lambda *_: reasons)
    cli_output.chosen_target(Path("dist"))
    captured = capsys.readouterr()
    assert captured.err == "target cpu; not vulkan: a GPU in software; not cuda:sm_90: no NVIDIA driver\n"
    assert not captured.out


def test_run_prints_several_prompts_apart(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", artifact, "a", "c", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out == "==> a <==\nb c\n\n==> c <==\nd e\n"


def test_run_json(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", artifact, "a b", "i", "--max-tokens", "4", "--json", "--logprobs", "2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], first["prompt_token_ids"], first["token_ids"]) == ("a b", [0, 1], [2, 3, 4, 5])
    assert (first["text"], first["finish_reason"]) == ("c d e f", "length")
    assert (second["text"], second["token_ids"], second["finish_reason"]) == ("j", [9, 10], "stop")
    assert set(first["timings"]) == {"ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s"}
    assert [step[0][0] for step in first["top_logprobs"]] == first["token_ids"]
    assert all(len(step) == 2 and step[0][1] >= step[1][1] for step in first["top_logprobs"])


def test_a_failed_prompt_does_not_stop_the_others(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", artifact, "a", "a " * 40, "--max-tokens", "1", "--json"]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == "b"
    assert "error" not in first
    assert second["finish_reason"] == "error"
    assert "40 tokens" in second["error"]


def test_a_failed_prompt_is_one_line_on_stderr(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", artifact, "a", "", "--max-tokens", "1"]) == 1
    assert "mlcgen: prompt 2: the prompt is empty" in capsys.readouterr().err
    assert main(["run", artifact, ""]) == 1
    assert capsys.readouterr().err.startswith("mlcgen: the prompt is empty")


def test_run_refuses_a_bad_parameter(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", artifact, "a", "--top-p", "2"]) == 1
    assert "top_p=2.0" in capsys.readouterr().err


def test_a_prompt_may_look_like_an_option(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", artifact, "--json", "--max-tokens", "1", "--", "-v"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "-v"


def test_chat_remembers_until_reset(artifact, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("g\n\nh\n/reset\na\n/exit\nnever\n"))
    assert main(["chat", artifact, "--temperature", "0", "--max-tokens", "2", "--system", "a"]) == 0
    assert capsys.readouterr().out.splitlines() == ["h i", "i j", "b c"]


def test_chat_goes_on_after_a_message_that_does_not_fit(artifact, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a " * 40 + "\nb\n"))
    assert main(["chat", artifact, "--temperature", "0", "--max-tokens", "1"]) == 0
    captured = capsys.readouterr()
    assert "40 tokens" in captured.err
    assert captured.out == "c\n"


def test_ctrl_c_ends_an_answer_not_the_chat(artifact, monkeypatch, capsys) -> None:
    step, calls = Alphabet.step, 0

    def interrupted(self: Alphabet, batch: StepInput) -> Float32:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Alphabet, "step", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nc\n"))
    assert main(["chat", artifact, "--temperature", "0", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out == "b\nd e\n"


def test_ctrl_c_during_run(artifact: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Alphabet, "step", fail_with(KeyboardInterrupt()))
    assert main(["run", artifact, "a", "b"]) == 1
    assert capsys.readouterr().err == "mlcgen: interrupted\n"


def test_ctrl_c_that_a_library_turned_into_its_own_error() -> None:
    """Seen with TVM: a RuntimeError without a word instead of the KeyboardInterrupt, and chatter at the end."""
    code = """
import atexit, os, signal, sys, time, mlcgen
from mlcgen import cli_output
from mlcgen.cli import main
def compile(*args, **options):
    try:
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)  # Python may take note of it a moment later
    except KeyboardInterrupt:
        raise RuntimeError from None
mlcgen.compile = compile
atexit.register(os.write, 2, b"chatter")
sys.exit(main(["compile", "m"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "mlcgen: interrupted\n")


def test_eval_text_and_ids_agree(artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("a b c d b a")
    (tmp_path / "ids").write_text("[0, 1, 2, 3, 1, 0]")
    assert main(["eval", artifact, "--text", str(tmp_path / "text"), "--window", "4", "--json"]) == 0
    assert main(["eval", artifact, "--ids", str(tmp_path / "ids"), "--window", "4", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second
    assert set(first) == {"ppl", "nll_sum", "predicted", "window"}
    assert first["predicted"] == 4


@pytest.mark.parametrize("option", ["--text", "--ids"])
def test_eval_of_a_missing_file(option: str, artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", artifact, option, "no-such-file", "--window", "4"]) == 1
    assert "no-such-file" in capsys.readouterr().err


def test_eval_window_beyond_the_context(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", artifact, "--ids", "any", "--window", "33"]) == 1
    assert "--window 33" in capsys.readouterr().err


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_verify(passed: bool, status: int, stub, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"kl_divergence": 0.5, "quantization": "q4", "passed": passed}
    stub("mlcgen.verify", verify=lambda artifact, model, target, progress: result)
    assert main(["verify", "a", "--json"]) == status
    captured = capsys.readouterr()
    assert json.loads(captured.out) == result
    assert ("q4" in captured.err) != passed


def test_plan_and_devices_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "vocab_size": 100, "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "-q", "f32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True
    assert main(["plan", str(tmp_path), "--context-length", "129"]) == 1
    assert "--context-length" in capsys.readouterr().err
    assert main(["devices", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["kind"] == "cpu"
    assert main(["devices"]) == 0
    assert "missing: no HIP runtime (libamdhip64) is installed" in capsys.readouterr().out


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlcgen {mlcgen.__version__}\n"
    assert main(["--help"]) == 0
    verbs = ("compile", "run", "chat", "eval", "verify", "inspect", "plan", "devices")
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in verbs)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_starting_up_imports_no_compiler() -> None:
    code = "import sys, mlcgen, mlcgen.cli, mlcgen.runtime.llm; mlcgen.LLM, mlcgen.SamplingParams; print(*sys.modules)"
    assert not {"tvm", "torch", "transformers", "gguf"} & set(python(code).split())


def test_compile_is_a_function_whatever_is_imported_first(tmp_path: Path) -> None:
    """`mlcgen.compile` names a module too; a package like ours with a light module in its place shows the binding."""
    source = Path(mlcgen.__file__).read_text()
    (tmp_path / "mlcgen").mkdir()
    (tmp_path / "mlcgen/__init__.py").write_text(source)
    (tmp_path / "mlcgen/compile.py").write_text("def compile(): return 'compiled'\ndef other(): return 'other'\n")
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mlcgen; "
    for imports in ("", "import mlcgen.compile", "from mlcgen.compile import other", "from mlcgen import compile"):
        assert python(f"{start}{imports}\nprint(mlcgen.compile())") == "compiled\n"
