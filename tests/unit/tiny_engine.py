"""A tiny real model that attends through its pages, and engines on it."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlcgen.runtime.draft_model import ModelDrafter
from mlcgen.runtime.engine import Engine
from mlcgen.runtime.executor import Float32, StepInput
from mlcgen.runtime.heavy_hitters import KeyLayout
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.outputs import RequestOutput
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.speculation import Drafter
from mlcgen.runtime.tokenizer import Tokenizer

VOCAB, HEADS, HEAD_DIM, CONTEXT = 300, 2, 8, 200
WIDTH = HEADS * HEAD_DIM
REPETITIVE = [5, 6, 7, 8, 9] * 6


class NumpyExecutor:
    """One attention layer over pages, row by row so that a token's logits do not depend on the batch's shape.

    Pages start as NaN: a key that is read before it is written, or from a wrong page, does not go unnoticed.
    """

    vocab_size = VOCAB
    supports_trees = True

    def __init__(
        self, num_pages: int = 64, page_size: int = 4, max_tokens_per_step: int = 64, window: int = CONTEXT
    ) -> None:
        self.window = window
        self.num_pages, self.page_size, self.max_tokens_per_step = num_pages, page_size, max_tokens_per_step
        random = np.random.default_rng(0)
        self.embedding = random.standard_normal((VOCAB, WIDTH))
        self.position = random.standard_normal((CONTEXT, WIDTH))
        self.qkv = random.standard_normal((3, WIDTH, HEADS, HEAD_DIM)) / WIDTH**0.5
        self.head = random.standard_normal((WIDTH, VOCAB))
        self.pages = np.full((num_pages, 2, HEADS, page_size, HEAD_DIM), np.nan)
        self.page_shape = (1, self.pages[0].nbytes)
        self.poisoned_token: int | None = None
        self.num_checked = 0
        self.fail_next = False
        self.num_steps = 0
        self.threads: set[int] = set()
        self.before_step: Callable[[], None] = lambda: None

    def step(self, batch: StepInput) -> Float32:
        self.before_step()
        self.num_steps += 1
        self.threads.add(threading.get_ident())
        self.check(batch)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("out of device memory")
        hidden = np.concatenate([self.attend(batch, s) for s in range(len(batch.seq_lens))])
        logits = (hidden[batch.logit_rows, None] @ self.head)[:, 0]
        if self.poisoned_token is not None:
            logits[batch.input_ids[batch.logit_rows] == self.poisoned_token, 5] = np.nan
        return logits.astype(np.float32)

    def first_not_finite(self, batch: StepInput) -> str | None:
        self.num_checked += 1
        return None if np.isfinite(self.step(batch)).all() else "kernel head"

    def copy_page(self, source: int, to: int) -> None:
        self.pages[to] = self.pages[source]

    def pinned(self, num_bytes: int) -> np.ndarray:
        return np.zeros(num_bytes, np.uint8)

    def read_pages(self, pages: Sequence[int], host: np.ndarray, places: Sequence[int]) -> None:
        host[0, places] = self.pages[list(pages)].reshape(len(pages), -1).view(np.uint8)

    def write_pages(self, pages: Sequence[int], host: np.ndarray, places: Sequence[int]) -> None:
        self.pages[list(pages)] = host[0, places].view(np.float64).reshape(-1, *self.pages.shape[1:])

    def synchronize(self) -> None: ...

    def attend(self, batch: StepInput, s: int) -> Any:
        rows = range(batch.query_start[s], batch.query_start[s + 1])
        return np.array([self.attend_row(batch, s, row) for row in rows])

    def attend_row(self, batch: StepInput, s: int, row: int) -> Any:
        position = batch.positions[row]
        x = self.embedding[batch.input_ids[row]] + self.position[position]
        q, k, v = np.einsum("d,adhe->ahe", x, self.qkv)  # (heads, head_dim)
        page, offset = divmod(int(batch.slot_mapping[row]), self.page_size)
        self.pages[page, 0, :, offset], self.pages[page, 1, :, offset] = k, v
        blocks = self.pages[batch.block_table[s]]  # (blocks, 2, heads, page_size, head_dim)
        cells = blocks.transpose(1, 2, 0, 3, 4).reshape(2, HEADS, -1, HEAD_DIM)
        keys, values = cells[:, :, self.visible(batch, s, row)]
        scores = np.einsum("he,hte->ht", q, keys)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out = np.einsum("ht,hte->he", weights / weights.sum(1, keepdims=True), values)
        return x + 3 * out.reshape(WIDTH)

    def visible(self, batch: StepInput, s: int, row: int) -> list[int]:
        """Cells that a token attends to."""
        mask = 0 if batch.tree_masks is None else int(batch.tree_masks[row]) & 0xFFFFFFFF
        first = max(int(batch.positions[row]) + 1 - self.window, 0)
        if not mask:
            return list(range(first, batch.positions[row] + 1))
        cached = int(batch.seq_lens[s]) - int(batch.query_start[s + 1] - batch.query_start[s])
        return [*range(first, cached), *(cached + bit for bit in range(32) if mask >> bit & 1)]

    def check(self, batch: StepInput) -> None:
        num_tokens, num_seqs = len(batch.input_ids), len(batch.seq_lens)
        arrays = [array for array in vars(batch).values() if array is not None]
        assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in arrays)
        assert batch.positions.shape == batch.slot_mapping.shape == (num_tokens,)
        assert batch.query_start.shape == (num_seqs + 1,)
        assert batch.query_start[0] == 0
        assert batch.query_start[-1] == num_tokens <= self.max_tokens_per_step
        assert (np.diff(batch.query_start) > 0).all()
        assert len(set(batch.slot_mapping.tolist())) == num_tokens
        assert batch.slot_mapping.max() < self.num_pages * self.page_size
        last = batch.query_start[1:] - 1
        is_tree = [self.is_tree(batch, s) for s in range(num_seqs)]
        assert all(batch.positions[last[s]] + 1 == batch.seq_lens[s] for s in range(num_seqs) if not is_tree[s])
        assert (np.diff(batch.logit_rows) > 0).all()
        wanted = set(batch.logit_rows.tolist())
        assert wanted <= set(range(num_tokens))
        for s in range(num_seqs):
            rows = [row for row in range(batch.query_start[s], batch.query_start[s + 1]) if row in wanted]
            assert rows == list(range(last[s] + 1 - len(rows), last[s] + 1)), "the last ones: a draft's, and the next"
            assert is_tree[s] or (np.diff(batch.positions[batch.query_start[s] : batch.query_start[s + 1]]) == 1).all()

    def is_tree(self, batch: StepInput, s: int) -> bool:
        rows = slice(batch.query_start[s], batch.query_start[s + 1])
        if batch.tree_masks is None or not batch.tree_masks[rows].any():
            return False
        assert rows.stop - rows.start <= 32
        assert (batch.positions[rows] < batch.seq_lens[s]).all()
        masks = batch.tree_masks[rows].view(np.uint32).tolist()
        assert all(mask == 0 or mask >> i == 1 for i, mask in enumerate(masks)), "itself and earlier ones"
        return True


def greedy(max_tokens: int | None = 12, **params: Any) -> SamplingParams:
    params = {"temperature": 0.0, "ignore_eos": True} | params
    return SamplingParams(max_tokens=max_tokens, **params)


def make_engine(
    tokenizer: Tokenizer | None = None,
    *,
    max_batch: int = 8,
    executor: Any = None,
    options: EngineOptions | None = None,
    drafter: Drafter | None = None,
    window: int = 0,
    keys: KeyLayout | None = None,
    **sizes: int,
) -> Engine:
    executor = executor or NumpyExecutor(**sizes, **({"window": window} if window else {}))
    return Engine(executor, tokenizer, [0], CONTEXT, max_batch, options, drafter, window, keys)


def drafting_engine(options: dict[str, object], **sizes: int) -> Engine:
    """With a draft model that agrees with the large one on two tokens of three."""
    drafter = None
    if options["speculation"] == "model":
        small = NumpyExecutor(num_pages=20, page_size=16)
        small.head = small.head + 0.2 * np.random.default_rng(2).standard_normal(small.head.shape)
        drafter = ModelDrafter(small, CONTEXT, 8, options["branches"])  # type: ignore[arg-type]
        options = options | {"draft_model": Path("small")}
    return make_engine(options=EngineOptions(**options), drafter=drafter, **sizes)  # type: ignore[arg-type]


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    outputs = [engine.add_request(str(i), prompt, params) for i, (prompt, params) in enumerate(requests)]
    for _ in range(5000):
        if not engine.has_unfinished:
            break
        engine.step()
    assert all(output.finished for output in outputs)
    assert engine.pool.num_free == engine.pool.num_pages
    return outputs


def run_alone(requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    return [run(make_engine(), [request])[0].token_ids for request in requests]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng([length, seed]).integers(1, VOCAB, length).tolist()
    return ids
