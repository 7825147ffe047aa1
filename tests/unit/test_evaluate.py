import json
import math

import numpy as np
import pytest

from mlcgen.errors import RequestError
from mlcgen.evaluate import perplexity, read_ids
from mlcgen.runtime.executor import Float32, StepInput


class TableExecutor:
    """Logits of the next token are a row of a table by the current token; pages remember what was written to them."""

    def __init__(self, table: Float32, num_pages: int = 64, page_size: int = 4, max_tokens_per_step: int = 32) -> None:
        self.table = table
        self.num_pages, self.page_size, self.max_tokens_per_step = num_pages, page_size, max_tokens_per_step
        self.vocab_size = len(table)
        self.slots = np.full(num_pages * page_size, -1, np.int64)
        self.largest_step = 0

    def step(self, batch: StepInput) -> Float32:
        self.largest_step = max(self.largest_step, len(batch.input_ids))
        assert batch.query_start.tolist() == [0, len(batch.input_ids)]
        assert batch.seq_lens.tolist() == [batch.positions[-1] + 1]
        blocks, offsets = np.divmod(batch.positions, self.page_size)
        assert (batch.slot_mapping == batch.block_table[0][blocks] * self.page_size + offsets).all()
        self.slots[batch.slot_mapping] = batch.positions
        context = np.arange(batch.seq_lens[0])
        held = self.slots[batch.block_table[0][context // self.page_size] * self.page_size + context % self.page_size]
        assert (held == context).all(), "a step reads tokens that were not written"
        return self.table[batch.input_ids][batch.logit_rows]


def uniform(vocab: int, **sizes: int) -> TableExecutor:
    return TableExecutor(np.full((vocab, vocab), 7.0, np.float32), **sizes)


@pytest.mark.parametrize("window", [2, 5, 64, 200])
def test_uniform_logits_give_the_vocabulary_size(window: int) -> None:
    ids = np.random.default_rng(0).integers(0, 11, 193).tolist()
    assert perplexity(uniform(11), ids, window)["ppl"] == pytest.approx(11)


@pytest.mark.parametrize(("count", "predicted"), [(2, 1), (8, 7), (9, 7), (10, 8), (17, 14)])
def test_windows_are_independent_and_a_last_single_token_is_left_out(count: int, predicted: int) -> None:
    assert perplexity(uniform(5), [1] * count, 8)["predicted"] == predicted


def test_golden_counts() -> None:
    result = perplexity(uniform(3, num_pages=128), [1] * 4096, 512)
    assert (result["predicted"], result["window"]) == (4088, 512)


def test_equals_direct_sum() -> None:
    rng = np.random.default_rng(1)
    executor = TableExecutor(rng.normal(0, 3, (17, 17)).astype(np.float32))
    ids = rng.integers(0, 17, 100)
    exact = executor.table.astype(np.float64)
    logprobs = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    expected = -sum(logprobs[ids[i - 1], ids[i]] for i in range(100) if i % 30)
    result = perplexity(executor, ids.tolist(), 30)
    assert result["nll_sum"] == pytest.approx(expected)
    assert result["ppl"] == pytest.approx(math.exp(expected / result["predicted"]))


@pytest.mark.parametrize(("limit", "largest"), [(10, 10), (1000, 128)])
def test_steps_are_small(limit: int, largest: int) -> None:
    executor = uniform(3, max_tokens_per_step=limit)
    perplexity(executor, [0] * 256, 256)
    assert executor.largest_step == largest


def test_hopeless_logits_give_infinity() -> None:
    table = np.zeros((2, 2), np.float32)
    table[0, 1] = 1e6
    assert perplexity(TableExecutor(table), [0, 0, 0], 3)["ppl"] == math.inf


def test_reports_progress_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(uniform(3), [0] * 20, 8, lambda done, total: seen.append((done, total)))
    assert seen == [(8, 20), (16, 20), (20, 20)]


@pytest.mark.parametrize(
    ("ids", "window", "says"),
    [([1], 8, "at least 2"), ([0, 3], 8, "token id 3"), ([0, -1], 8, "token id -1"), ([0, 1], 999, "window 999")],
)
def test_refuses(ids: list[int], window: int, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        perplexity(uniform(3), ids, window)


@pytest.mark.parametrize("data", [[1, 2], {"ids": [1, 2], "window": 5}])
def test_reads_ids(tmp_path, data: object) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(data))
    assert read_ids(tmp_path / "ids.json") == [1, 2]


@pytest.mark.parametrize("text", ["", "{", "3", '["a"]', "[1, true]", "[1.5]", '{"tokens": [1]}', "[[1, 2]]"])
def test_refuses_what_is_no_ids(tmp_path, text: str) -> None:
    (tmp_path / "ids.json").write_text(text)
    with pytest.raises(RequestError, match=r"ids\.json"):
        read_ids(tmp_path / "ids.json")
