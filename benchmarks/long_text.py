"""What texts lose that outgrow their window, by what stays of them: `EngineOptions.window_keeps`.

python benchmarks/long_text.py ARTIFACT [--target T] [--window N ...] [--trials N] [--tokens N]

A text of tests/data, token by token: how much the model is surprised by each, and how long a window's move takes. Then
a pass key in the first half of a long prompt (Mohtashami and Jaggi, 2023), which the model is asked for when the prompt
has been cut to half of the window.
"""

import argparse
import functools
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mlcgen.artifact import read_tokenizer_config
from mlcgen.evaluate import read_ids
from mlcgen.runtime.engine import Engine
from mlcgen.runtime.executor import Float32, StepInput
from mlcgen.runtime.grammar import StructuredOutput
from mlcgen.runtime.load import LoadedModel, load_executor
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.tokenizer import Tokenizer

TEXT = Path(__file__).parents[1] / "tests" / "data" / "smollm2_135m_ppl_ids_humaneval.json"
GIVEN = 16  # tokens of the text that are a prompt
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TASK = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
QUESTION = " What is the pass key? The pass key is "


class Dictated:
    """An executor whose model says a given text, whatever it would have said; it counts by how much it differs."""

    def __init__(self, executor: Any, text: list[int]) -> None:
        self._executor, self._text = executor, text
        self.position, self.nll_sum = GIVEN, 0.0

    def __getattr__(self, name: str) -> Any:
        if name in ("looks_ahead", "start", "finish"):  # tokens are chosen from the logits here
            raise AttributeError(name)
        return getattr(self._executor, name)

    def step(self, batch: StepInput) -> Float32:
        logits: Float32 = self._executor.step(batch)
        if not len(batch.logit_rows):
            return logits
        assert len(batch.logit_rows) == 1
        row, token = logits[0].astype(np.float64), self._text[self.position]
        self.nll_sum += np.log(np.exp(row - row.max()).sum()) + row.max() - row[token]
        self.position += 1
        said = np.zeros_like(logits)
        said[0, token] = 1
        return said


@functools.cache
def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer(path, read_tokenizer_config(path.parent))


def new_engine(model: LoadedModel, executor: Any, options: dict[str, Any]) -> Engine:
    assert model.tokenizer_path is not None, "the artifact has no tokenizer"
    tokenizer, sizes = tokenizer_of(model.tokenizer_path), (model.context_length, 1)
    chosen = EngineOptions(prefix_cache=False, **options)
    return Engine(executor, tokenizer, model.eos_token_ids, *sizes, chosen, None, model.window, model.keys)


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> str:
    output = engine.add_request("0", prompt, params, stream=False)
    while engine.has_unfinished:
        engine.step()
    if output.error is not None:
        raise output.error
    return output.text


def dictate(model: LoadedModel, text: list[int], options: dict[str, Any]) -> tuple[float, float]:
    """(nats per token, seconds per token)"""
    executor = Dictated(model.executor, text)
    engine, begun = new_engine(model, executor, options), time.perf_counter()
    wanted = len(text) - GIVEN
    run(engine, text[:GIVEN], SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True))
    return executor.nll_sum / wanted, (time.perf_counter() - begun) / wanted


def pass_keys_found(model: LoadedModel, length: int, trials: int, options: dict[str, Any]) -> int:
    """Of so many prompts of `length` tokens. The key is in their first half, of which the last tokens know nothing."""
    assert model.tokenizer_path is not None
    tokenizer, found = tokenizer_of(model.tokenizer_path), 0
    for trial in range(trials):
        random_ = random.Random(trial)
        key = str(random_.randrange(10000, 100000))
        task, filler, info = map(
            tokenizer.encode, (TASK, FILLER, f" The pass key is {key}. Remember it. {key} is the pass key.")
        )
        parts = (length - len(task) - len(info)) // len(filler)
        before = random_.randrange(1, parts // 2)
        prompt = task + filler * before + info + filler * (parts - before)
        # The question comes after the window has moved: as what the grammar has the model say.
        asked = StructuredOutput(regex=QUESTION.replace("?", r"\?") + "[0-9]{5}")
        text = run(new_engine(model, model.executor, options), prompt, SamplingParams(temperature=0, structured=asked))
        found += text.endswith(key)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--window", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--trials", type=int, default=20, help="prompts with pass keys")
    arguments = parser.parse_args()
    model, text = load_executor(arguments.artifact, arguments.target), read_ids(TEXT)[: arguments.tokens]
    table = Table("window", "keeps", "nats/token", "ms/token", f"pass keys of {arguments.trials}")
    for window in arguments.window:
        for keeps in ("all", "last", "heavy"):
            options = {} if keeps == "all" else {"window": window, "window_keeps": keeps}
            nats, seconds = dictate(model, text, options)
            found = pass_keys_found(model, 2 * window, arguments.trials, options)
            table.add_row(str(window), keeps, f"{nats:.3f}", f"{1e3 * seconds:.2f}", str(found))
    Console().print(table)


if __name__ == "__main__":
    main()
