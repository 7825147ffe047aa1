"""From one row of logits to one token. Names, defaults and order of operations as in vLLM."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import RequestError
from mlcgen.runtime.distribution import Distribution, verified
from mlcgen.runtime.executor import Float32, Int32
from mlcgen.runtime.grammar import Grammar, StructuredOutput
from mlcgen.runtime.grammar_vocabulary import Mask

__all__ = ["Sampled", "Sampler", "SamplingParams", "largest_reaching", "top_k_ids"]

# Below this temperature the softmax is a one-hot in float32 anyway (the same bound as vLLM's).
GREEDY_TEMPERATURE = 1e-5
# Tokens that share one maximum in a first pass over the vocabulary.
BLOCK = 256
NO_TOKEN = -1  # of a row after the end of a text that its grammar ends

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises RequestError that names the field and its value."""

    n: int = 1
    """Sequences per prompt: with a seed, the i-th has seed + i. They share the prompt's pages."""
    beam_width: int = 0
    """Beam search with so many sequences at a time, which gives the n best of them; 0: sampling. The texts are those of
    the largest sum of log-probabilities per token, and have no use for what chooses single tokens."""
    length_penalty: float = 1.0
    """Of beam search: the power of its length by which a text's sum of log-probabilities is divided."""
    temperature: float = 1.0
    """0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities add up to this (arXiv:1904.09751)."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that a token is in the output."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits, by token id."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is in the batch."""
    max_tokens: int | None = 16
    """Tokens to generate at most; None goes on to the end of the context."""
    min_tokens: int = 0
    """No end of sequence and no stop before this many tokens."""
    stop: str | list[str] | None = None
    """Strings that end the text; they are not part of it."""
    stop_token_ids: list[int] | None = None
    """Token ids that end the text, besides the model's own."""
    include_stop_str_in_output: bool = False
    """Keep the stop string at the end of the text."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    logprobs: int | None = None
    """Report this many best log-probabilities per token, of the raw logits, and the chosen token's; -1 for all."""
    structured: StructuredOutput | None = None
    """What the text must be: JSON of a schema, a regular expression, a grammar, one of several strings."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        for name, expected, is_valid, wanted in _CHECKS:
            value = getattr(self, name)
            if not (_is_a(value, expected) and is_valid(value)):
                raise RequestError(f"{name}={value!r} is not valid; it must be {wanted}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _is_a(value: object, expected: tuple[type, ...]) -> bool:
    """isinstance in which True is no number."""
    return isinstance(value, expected) and (bool in expected or not isinstance(value, bool))


def _is_token_id(value: object) -> bool:
    return _is_a(value, (int,)) and 0 <= value < 2**31  # type: ignore[operator]


def _is_bias(bias: dict[int, float] | None) -> bool:
    return all(_is_token_id(t) and _is_a(b, _NUMBER) and abs(b) < _TOO_LARGE for t, b in (bias or {}).items())


def _is_stop(stop: str | list[str] | None) -> bool:
    return stop is None or all(isinstance(s, str) and s for s in ([stop] if isinstance(stop, str) else stop))


_NONE = type(None)
_INT = (int, np.integer)
_NUMBER = (int, float, np.integer, np.floating)
_BOOL = (bool,)
_TOO_LARGE = 3e38  # as float32, in which logits are
_CHECKS: list[tuple[str, tuple[type, ...], Callable[[Any], bool], str]] = [
    ("n", _INT, lambda x: 1 <= x <= 1024, "an integer from 1 to 1024"),
    ("beam_width", _INT, lambda x: 0 <= x <= 64, "an integer from 0 to 64"),
    ("length_penalty", _NUMBER, lambda x: 0 <= x < _TOO_LARGE, "a finite number >= 0"),
    ("temperature", _NUMBER, lambda x: 0 <= x < _TOO_LARGE, "a finite number >= 0"),
    ("top_p", _NUMBER, lambda x: 0 < x <= 1, "a number in (0, 1]"),
    ("top_k", _INT, lambda x: x >= -1, "an integer >= 1, or 0 or -1 for all tokens"),
    ("min_p", _NUMBER, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    ("repetition_penalty", _NUMBER, lambda x: 0 < x < _TOO_LARGE, "a finite number > 0"),
    ("presence_penalty", _NUMBER, lambda x: -2 <= x <= 2, "a number in [-2, 2]"),
    ("frequency_penalty", _NUMBER, lambda x: -2 <= x <= 2, "a number in [-2, 2]"),
    ("logit_bias", (dict, _NONE), _is_bias, "a dict of token id to finite number"),
    ("seed", (*_INT, _NONE), lambda x: x is None or x >= 0, "an integer >= 0 or None"),
    ("max_tokens", (*_INT, _NONE), lambda x: x is None or x >= 1, "an integer >= 1 or None"),
    ("min_tokens", _INT, lambda x: x >= 0, "an integer >= 0"),
    ("stop", (str, list, tuple, _NONE), _is_stop, "a non-empty string or a list of them"),
    ("stop_token_ids", (list, tuple, _NONE), lambda x: all(map(_is_token_id, x or [])), "a list of token ids"),
    ("include_stop_str_in_output", _BOOL, lambda x: True, "True or False"),
    ("ignore_eos", _BOOL, lambda x: True, "True or False"),
    ("logprobs", (*_INT, _NONE), lambda x: x is None or x >= -1, "an integer >= 0, -1 for all tokens, or None"),
    ("structured", (StructuredOutput, _NONE), lambda x: True, "a StructuredOutput or None"),
    ("skip_special_tokens", _BOOL, lambda x: True, "True or False"),
]


@dataclass(frozen=True)
class Sampled:
    """What was chosen from one step's logits, by row. Where a maximum is not finite, the other two mean nothing."""

    tokens: list[int]  # perhaps NO_TOKEN
    maxima: list[float]  # the largest raw logit; a NaN if there is one
    logprobs: list[dict[int, float] | None]  # as Sampler.logprobs; None for rows that want none


class Sampler:
    """One request's choice of tokens: its parameters, its random numbers and the tokens it has seen."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Iterable[int],
        stop_token_ids: Iterable[int],
        grammar: Grammar | None = None,
    ) -> None:
        self.params = params
        self.grammar = grammar
        self.error: RequestError | None = None
        """Why the grammar cannot go on; the tokens since then mean nothing."""
        self._seen = _SeenTokens(prompt_token_ids) if params.has_penalties else None
        self._bias = _SparseBias(params.logit_bias) if params.logit_bias else None
        self._stop_ids: Int64 = np.array(sorted(stop_token_ids), np.int64)
        self._random = None if params.is_greedy else np.random.default_rng(params.seed)
        self._num_tokens = 0
        self.is_argmax = params.is_greedy and not (self._seen or self._bias or params.min_tokens or grammar)
        """Whether the most likely token is always the answer, so that `sample` need not be called."""

    def sample(self, logits: Float32, best: int, guess: tuple[int, Distribution] | None = None) -> int:
        """Next token for `logits` (vocab,), left unchanged, with finite maximum at `best`. At most one random number.

        guess: a token and what it was drawn from; the token is then as often that one as the distribution allows, and
        two random numbers are used.

        Order: bias, penalties, grammar, temperature, top-k and min-p, top-p.
        """
        if self._changes_logits:
            logits = self._adjusted(logits)
            best = int(logits.argmax())
        token = best if self._random is None else self._draw(logits, best, guess, self._random)
        self.record(token)
        return token

    def logprobs(self, logits: Float32, best: int, token: int) -> dict[int, float]:
        """Log-softmax of the raw `logits` (vocab,) for the best `params.logprobs` tokens, best first, and `token`."""
        top = logits[best]
        log_sum = float(top) + math.log(float(np.exp(logits - top).sum(dtype=np.float64)))
        count = self.params.logprobs or 0
        ids = top_k_ids(logits, len(logits) if count < 0 else count)
        chosen = dict(zip(ids.tolist(), (logits[ids].astype(np.float64) - log_sum).tolist(), strict=True))
        chosen.setdefault(token, float(logits[token]) - log_sum)
        return chosen

    @property
    def _changes_logits(self) -> bool:
        return bool(self._seen or self._bias or self.grammar or self._num_tokens < self.params.min_tokens)

    def _adjusted(self, logits: Float32) -> Float32:
        logits = logits.copy()
        mask = self.mask()
        logits[self.banned] = -np.inf
        if self._bias:
            logits[self._bias.ids] += self._bias.values
        if self._seen:
            self._penalize(logits, self._seen)
        if mask is not None:
            logits[~_allowed(mask, len(logits))] = -np.inf
        return logits

    def _penalize(self, logits: Float32, seen: "_SeenTokens") -> None:
        params, ids, counts = self.params, seen.ids, seen.output_counts
        values = logits[ids]  # (distinct tokens,)
        values = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        logits[ids] = values

    def _draw(
        self, logits: Float32, best: int, guess: tuple[int, Distribution] | None, random: np.random.Generator
    ) -> int:
        candidates = self.candidates(logits, best)
        return candidates.draw(random.random()) if guess is None else verified(candidates, *guess, len(logits), random)

    def candidates(self, logits: Float32, best: int) -> Distribution:
        """The tokens that may be drawn, from logits in which bias, penalties and grammar are already."""
        params, top = self.params, logits[best]
        ids: Int64 | None = None
        if 0 < params.top_k < len(logits):
            ids = top_k_ids(logits, params.top_k)
            logits = logits[ids]
        with np.errstate(over="ignore"):  # to minus infinity, which is right
            weights: Float32 = np.exp((logits - top) * np.float32(1 / params.temperature))  # the best token's is 1
        if params.min_p > 0:
            ids, weights = _keep(weights >= params.min_p, ids, weights)
        if params.top_p < 1:
            ids, weights = _nucleus(params.top_p, ids, weights)
        return Distribution(ids, weights)

    @property
    def has_history(self) -> bool:
        """Whether the choice of a token depends on those before it, besides through the logits."""
        return bool(self._seen or self.params.min_tokens or self.grammar)

    def mask(self) -> Mask | None:
        """The tokens that the grammar allows next, (ceil(vocab / 32),); None: all."""
        if self.grammar is None or self.error is not None:
            return None
        try:
            return self.grammar.mask()
        except RequestError as error:
            self.error = error
            return None

    @property
    def bias(self) -> tuple[Int64, Float32]:
        """Token ids and what is added to their logits."""
        return (self._bias.ids, self._bias.values) if self._bias else (np.zeros(0, np.int64), np.zeros(0, np.float32))

    @property
    def seen(self) -> tuple[Int32, Int32]:
        """Token ids that penalties apply to, and how often each is in the output."""
        empty = np.zeros(0, np.int32)
        return (self._seen.ids, self._seen.output_counts) if self._seen else (empty, empty)

    @property
    def banned(self) -> Int64:
        """Token ids that may not come yet."""
        is_early = self._num_tokens < self.params.min_tokens
        return self._stop_ids[: None if is_early and not (self.grammar and self.grammar.is_finished) else 0]

    def next_uniform(self) -> float:
        """The random number in [0, 1) for the next token; 0 if greedy."""
        return 0.0 if self._random is None else self._random.random()

    def record(self, token: int) -> None:
        """`token` is the next one."""
        self._num_tokens += 1
        if self._seen:
            self._seen.add(token)
        if self.grammar is not None and self.error is None:
            try:
                self.grammar.accept(token)
            except RequestError as error:
                self.error = error


def _allowed(mask: Mask, count: int) -> npt.NDArray[np.bool_]:
    """(count,)"""
    return np.unpackbits(mask.view(np.uint8), bitorder="little", count=count).view(np.bool_)


def top_k_ids(logits: Float32, k: int) -> Int64:
    """Ids of the k largest of `logits` (vocab,), largest first and the lower id first among equals.

    The k-th largest of the blocks' maxima is a lower bound of the k-th largest logit, so only the few above it are
    sorted: at 150,000 tokens and k = 50 this takes 0.1 ms, np.argpartition 1.5 ms.
    """
    if k <= 0:
        return np.empty(0, np.int64)
    maxima = np.maximum.reduceat(logits, np.arange(0, len(logits), BLOCK))
    bound = np.partition(maxima, -k)[-k] if k <= len(maxima) else -np.inf
    ids = np.flatnonzero(logits >= bound)
    return ids[np.argsort(-logits[ids], kind="stable")[:k]]


def _keep(mask: npt.NDArray[np.bool_], ids: Int64 | None, weights: Float32) -> tuple[Int64, Float32]:
    kept = np.flatnonzero(mask)
    return (kept if ids is None else ids[kept]), weights[kept]


def _nucleus(top_p: float, ids: Int64 | None, weights: Float32) -> tuple[Int64, Float32]:
    """The fewest largest weights that reach `top_p` of their sum."""
    target = top_p * float(weights.sum(dtype=np.float64))
    # All tokens below this together weigh less than 1 - top_p, so the nucleus has none of them.
    ids, weights = _keep(weights >= (1 - top_p) * target / top_p / len(weights), ids, weights)
    kept = largest_reaching(weights, target)
    return ids[kept], weights[kept]


def largest_reaching(weights: Float32, target: float) -> Int64:
    """Indices of the fewest largest `weights` (n,), all >= 0, that add up to `target`, in no particular order.

    Sorts only the bucket in which the sum reaches the target: the bit patterns of positive floats are in the order of
    their values, so exponent and leading bits of the fraction number a bucket.
    """
    buckets = weights.view(np.int32) >> 18
    cumulative = np.bincount(buckets, weights)[::-1].cumsum()  # from the bucket of the largest down
    index = min(int(cumulative.searchsorted(target)), len(cumulative) - 1)  # rounding may miss the end
    last = len(cumulative) - 1 - index
    edge = np.flatnonzero(buckets == last)
    edge = edge[np.argsort(-weights[edge], kind="stable")]
    missing = target - (cumulative[index - 1] if index else 0.0)
    num_edge = int(np.cumsum(weights[edge], dtype=np.float64).searchsorted(missing)) + 1
    return np.concatenate([np.flatnonzero(buckets > last), edge[:num_edge]])


class _SparseBias:
    def __init__(self, bias: dict[int, float]) -> None:
        self.ids: Int64 = np.array(list(bias), np.int64)
        self.values: Float32 = np.array(list(bias.values()), np.float32)


class _SeenTokens:
    """Distinct tokens of prompt and output in arrays that grow, so that a step touches only these."""

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        distinct = sorted(set(prompt_token_ids))
        self._index = {token: i for i, token in enumerate(distinct)}
        self._ids: Int32 = np.array(distinct, np.int32)
        self._counts: Int32 = np.zeros(len(distinct), np.int32)

    @property
    def ids(self) -> Int32:
        return self._ids[: len(self._index)]

    @property
    def output_counts(self) -> Int32:
        """Times in the output, 0 for a token of the prompt alone."""
        return self._counts[: len(self._index)]

    def add(self, token: int) -> None:
        index = self._index.setdefault(token, len(self._index))
        if index == len(self._ids):
            self._ids = np.resize(self._ids, 2 * index + 8)
            self._counts = np.concatenate([self._counts, np.zeros(index + 8, np.int32)])
        self._ids[index] = token
        self._counts[index] += 1
