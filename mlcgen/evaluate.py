"""Perplexity of a text under an artifact."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from mlcgen.errors import RequestError
from mlcgen.runtime.executor import Executor, Float32, Int32, StepInput

if TYPE_CHECKING:
    from mlcgen.runtime.load import LoadedModel

__all__ = ["Perplexity", "perplexity", "read_ids", "read_text"]

MAX_ROWS = 128  # rows of logits at a time, so that a large vocabulary needs little memory


class Perplexity(TypedDict):
    ppl: float
    nll_sum: float  # natural logarithm
    predicted: int
    window: int


def perplexity(
    executor: Executor, ids: Sequence[int], window: int = 512, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Score `ids` in non-overlapping windows, each from an empty context; its first token is given, not predicted.

    A last, shorter window counts if it has at least two tokens. progress(tokens done, tokens in all).
    Raises RequestError for too few tokens, ids outside of the vocabulary, or a window that the pages cannot hold.
    """
    tokens = _checked(executor, ids, window)
    nll_sum, predicted = 0.0, 0
    for start in range(0, len(tokens), window):
        chunk = tokens[start : start + window]
        if len(chunk) < 2:
            break
        nll_sum += _window_nll(executor, chunk)
        predicted += len(chunk) - 1
        if progress:
            progress(start + len(chunk), len(tokens))
    return {"ppl": _exp(nll_sum / predicted), "nll_sum": nll_sum, "predicted": predicted, "window": window}


def read_ids(path: Path) -> list[int]:
    """Token ids from JSON: a list, or an object with the list as "ids". Raises RequestError for anything else."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path} is not JSON ({error}); write the token ids as [1, 2, …]") from error
    ids = data.get("ids") if isinstance(data, dict) else data
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise RequestError(f'{path} has no token ids; write [1, 2, …] or {{"ids": [1, 2, …]}}')
    return ids


def read_text(model: "LoadedModel", path: Path) -> list[int]:
    """Token ids of a UTF-8 file. Raises RequestError if it is none, or the artifact has no tokenizer."""
    from mlcgen.runtime.tokenizer import Tokenizer

    if not model.tokenizer_path:
        raise RequestError("the artifact has no tokenizer; score token ids with --ids")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error}); convert it") from error
    return Tokenizer(model.tokenizer_path, dict(model.tokenizer_config)).encode(text)


def _checked(executor: Executor, ids: Sequence[int], window: int) -> Int32:
    capacity = executor.num_pages * executor.page_size
    if not 2 <= window <= capacity:
        raise RequestError(f"window {window} is not valid; it must be from 2 to {capacity}, what the KV cache holds")
    if len(ids) < 2:
        raise RequestError(f"the text has {len(ids)} token(s); perplexity needs at least 2")
    tokens = np.asarray(ids, np.int64)
    outside = tokens[(tokens < 0) | (tokens >= executor.vocab_size)]
    if outside.size:
        raise RequestError(f"token id {outside[0]} is outside of the vocabulary, 0 to {executor.vocab_size - 1}")
    return tokens.astype(np.int32)


def _window_nll(executor: Executor, tokens: Int32) -> float:
    """Sum of -log p(token | the tokens before it) over all tokens but the first."""
    return sum(
        _nll(executor.step(batch), tokens[batch.positions + 1])
        for batch in _steps(tokens[:-1], executor.page_size, min(MAX_ROWS, executor.max_tokens_per_step))
    )


def _steps(tokens: Int32, page_size: int, size: int) -> Iterator[StepInput]:
    """One sequence in pages 0, 1, …, taken `size` tokens at a time, with the logits of every token."""
    block_table = np.arange(-(-len(tokens) // page_size), dtype=np.int32)[None]
    for start in range(0, len(tokens), size):
        stop = min(start + size, len(tokens))
        positions = np.arange(start, stop, dtype=np.int32)
        yield StepInput(
            input_ids=np.ascontiguousarray(tokens[start:stop]),
            positions=positions,
            slot_mapping=positions,  # page i is the sequence's block i
            block_table=block_table,
            seq_lens=np.array([stop], np.int32),
            query_start=np.array([0, stop - start], np.int32),
            logit_rows=np.arange(stop - start, dtype=np.int32),
        )


def _nll(logits: Float32, targets: Int32) -> float:
    """Sum over rows of logsumexp(row) - row[target], in float64 row by row (a step's logits are many megabytes)."""
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        exact = row.astype(np.float64)
        largest = exact.max()
        total += float(largest + np.log(np.exp(exact - largest).sum()) - exact[target])
    return total


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
