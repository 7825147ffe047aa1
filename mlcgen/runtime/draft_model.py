"""Guesses from a smaller model with the same tokens (Leviathan et al., 2023), with pages of its own."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlcgen import artifact
from mlcgen.errors import ArtifactError
from mlcgen.runtime.distribution import Distribution
from mlcgen.runtime.draft import Draft
from mlcgen.runtime.executor import Executor, Float32
from mlcgen.runtime.kv_cache import PagePool, num_pages_for
from mlcgen.runtime.request import Request
from mlcgen.runtime.sampler import top_k_ids
from mlcgen.runtime.scheduler import Sequence
from mlcgen.runtime.step_input import step_input

if TYPE_CHECKING:
    from mlcgen.runtime.load import LoadedModel

__all__ = ["ModelDrafter", "load_drafter"]

Float64 = npt.NDArray[np.float64]

MAX_TOKENS = 1 << 15  # that its pages hold, at most
LEAST_CHANCE = 0.05  # of a guess that is worth a row of the large model


def load_drafter(
    path: str | Path,
    large: "LoadedModel",
    target: str = "auto",
    num_threads: int | None = None,
    branches: int = 1,
    trust: float | None = None,
) -> "ModelDrafter":
    """The artifact at `path` as a draft model of `large`. Raises ArtifactError if their tokens are not the same, and as
    load_executor does."""
    from mlcgen.runtime.load import default_num_pages, load_executor  # late: it brings the device's libraries

    manifest = artifact.read_manifest(path)
    wanted = min(MAX_TOKENS // int(manifest["kv"]["page_size"]), default_num_pages(manifest, large.max_batch))
    model = load_executor(path, target, wanted, num_threads=num_threads)
    sizes = model.executor.vocab_size, large.executor.vocab_size
    if sizes[0] != sizes[1]:
        raise ArtifactError(
            f"draft model {path} has {sizes[0]} tokens, the large one {sizes[1]}; they must be the same"
        )
    files = model.tokenizer_path, large.tokenizer_path
    if files[0] and files[1] and files[0].read_bytes() != files[1].read_bytes():
        raise ArtifactError(f"draft model {path} has another tokenizer than the large one; choose one of its family")
    return ModelDrafter(model.executor, model.context_length, model.max_batch, branches, trust)


class _Shadow(Sequence):
    """What the small model has of a sequence: its tokens, and behind them those that it guessed last."""

    def __init__(self) -> None:
        super().__init__([])
        self.random = np.random.default_rng()
        self.chance = 1.0  # that all of the guesses are right, as the small model sees it
        self.proposals: list[Distribution] = []
        self.leaves: list[tuple[float, int, int]] = []  # (chance, the node it comes after, token)

    def follow(self, tokens: list[int]) -> None:
        """Take over the sequence's tokens; what was computed of wrong guesses counts no longer."""
        start = len(self.tokens) - len(self.proposals)
        guessed = range(start, len(self.tokens))
        wrong = next((at for at in guessed if self.tokens[at : at + 1] != tokens[at : at + 1]), len(tokens))
        self.tokens[start:] = tokens[start:]
        self.num_tokens = len(tokens)
        self.num_computed = min(self.num_computed, wrong, len(tokens) - 1)
        self.chance, self.proposals, self.leaves = 1.0, [], []


class ModelDrafter:
    """branches: tokens that are guessed at one place, at most. With several the draft is a tree: the likeliest tokens
    one after the other, and beside each of them others that are likely too.

    A request that draws its tokens without a seed gets guesses that are drawn as well, so that they are right as often
    as the two models agree; one with a seed gets the likeliest ones, which leaves its random numbers alone.
    """

    def __init__(
        self,
        executor: Executor,
        context_length: int,
        max_batch: int,
        branches: int = 1,
        trust: float | None = None,
    ) -> None:
        """context_length, max_batch: what the small model was compiled for. trust: as in EngineOptions."""
        self.token_seconds = 0.0
        self._trust = trust
        self._executor, self._context_length, self._branches = executor, context_length, branches
        self._max_batch = max_batch
        self._pool = PagePool(executor.num_pages)
        self._shadows: dict[Request, _Shadow] = {}  # the one that was used longest ago first

    def propose(self, counts: Mapping[Request, int]) -> dict[Request, Draft]:
        """See Drafter.propose."""
        counts = dict(list(counts.items())[: self._max_batch])
        left = {r: count for r, count in counts.items() if self._has_room(r, count, counts)}
        drafts = {request: self._shadows[request] for request in left}
        batch = dict(left)
        self._catch_up([self._shadows[request] for request in batch])
        while batch:
            logits = self._step([self._shadows[request] for request in batch])
            for row, (request, count) in zip(logits, list(batch.items()), strict=True):
                shadow = self._shadows[request]
                if not self._guess(request, shadow, row) or len(shadow.proposals) == count:
                    del batch[request]
        made = {request: _draft(shadow, left[request] * self._branches) for request, shadow in drafts.items()}
        for request, draft in made.items():
            draft.is_trusted = self._trusts(request)
        return made

    def _trusts(self, request: Request) -> bool:
        sampler = request.sampler
        return self._trust is not None and sampler.is_argmax and sampler.params.logprobs is None

    def observe(self, request: Request, draft: Draft, tokens: list[int]) -> None:
        """See Drafter.observe. `follow` finds the tokens that were right."""

    def forget(self, request: Request) -> None:
        """See Drafter.forget."""
        shadow = self._shadows.pop(request, None)
        if shadow is not None:
            self._pool.free(shadow.table.clear())

    def _has_room(self, request: Request, count: int, others: Mapping[Request, int]) -> bool:
        """Make the small model's sequence and its pages ready, at the cost of those that nobody asks for now."""
        num_tokens = len(request.tokens) + count
        if num_tokens > self._context_length:
            return False
        shadow = self._shadows.pop(request, None) or _Shadow()
        self._shadows[request] = shadow
        missing = num_pages_for(num_tokens, self._executor.page_size) - len(shadow.table)
        for other in [other for other in self._shadows if other not in others]:
            if missing > self._pool.num_free:
                self.forget(other)
        if missing > self._pool.num_free:
            return False
        shadow.table.extend(self._pool.allocate(max(missing, 0)))
        shadow.follow(request.tokens)
        return True

    def _catch_up(self, batch: list[_Shadow]) -> None:
        """Compute what is missing, but for the last token of each."""
        most = self._executor.max_tokens_per_step
        while pending := [shadow for shadow in batch if shadow.num_uncomputed > 1]:
            budget, chunk = most, []
            for shadow in pending:
                if budget:
                    shadow.num_scheduled = min(shadow.num_uncomputed - 1, budget)
                    budget -= shadow.num_scheduled
                    chunk.append(shadow)
            self._executor.step(step_input(chunk, {}, self._executor.page_size)[0])
            _advance(chunk)

    def _step(self, batch: list[_Shadow]) -> Float32:
        """Logits after the last token of each, (sequences, vocab)."""
        begun = time.perf_counter()
        for shadow in batch:
            shadow.num_scheduled = 1
        logits = self._executor.step(step_input(batch, {}, self._executor.page_size)[0])
        _advance(batch)
        seconds = time.perf_counter() - begun
        self.token_seconds += 0.1 * (seconds - self.token_seconds) if self.token_seconds else seconds
        return logits

    def _guess(self, request: Request, shadow: _Shadow, logits: Float32) -> bool:
        """Another token of the chain, and those beside it. Whether a further one is of use."""
        node = len(shadow.proposals) - 1
        if request.draws_freely and self._branches == 1:
            candidates = request.sampler.candidates(logits, int(logits.argmax()))
            token = candidates.draw(shadow.random.random())
            chances = candidates.dense(len(logits))
        else:
            ids = top_k_ids(logits, max(self._branches, 1))
            token = int(ids[0])
            chances = _softmax(logits)
            if self._trusts(request) and chances[token] < (self._trust or 0.0):
                return False
            candidates = Distribution(ids[:1], np.ones(1, np.float32))
            shadow.leaves += [(shadow.chance * chances[other], node, int(other)) for other in ids[1:]]
        shadow.chance *= float(chances[token])
        shadow.proposals.append(candidates)
        shadow.tokens.append(token)
        shadow.num_tokens += 1
        return shadow.chance >= LEAST_CHANCE or self._trusts(request)


def _advance(batch: list[_Shadow]) -> None:
    for shadow in batch:
        shadow.num_computed += shadow.num_scheduled


def _softmax(logits: Float32) -> Float64:
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    return weights / weights.sum()


def _draft(shadow: _Shadow, most: int) -> Draft:
    """The chain, and the likeliest tokens beside it."""
    guessed = shadow.tokens[len(shadow.tokens) - len(shadow.proposals) :]
    is_drawn = any(proposal.ids is None or len(proposal.ids) > 1 for proposal in shadow.proposals)
    draft = Draft.chain(guessed, shadow.proposals if is_drawn else ())
    for chance, node, token in sorted(shadow.leaves, reverse=True)[: most - len(draft)]:
        if chance >= LEAST_CHANCE:
            draft.add(node, token)
    return draft
