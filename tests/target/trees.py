"""New tokens of a sequence, the last of which may be a random token tree: their masks, positions, and what they see."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlcgen.runtime.executor import Executor, StepInput


@dataclass(frozen=True)
class NewTokens:
    base: int  # tokens before them in the cache
    parents: list[int]  # of each, among them; -1: the token before them
    num_plain: int  # those before the tree

    @classmethod
    def random(cls, rng: np.random.Generator, base: int, num_plain: int, in_tree: int = 0) -> "NewTokens":
        last = num_plain - 1  # the tree's tokens come after it
        tree = [int(rng.integers(last, last + i + 1)) for i in range(in_tree)]
        return cls(base, [*range(-1, last), *tree], num_plain)

    def __len__(self) -> int:
        return len(self.parents)

    def path(self, i: int) -> list[int]:
        """The tokens from the first to this one."""
        return [*(self.path(self.parents[i]) if self.parents[i] >= 0 else []), i]

    @property
    def positions(self) -> np.ndarray:
        return np.array([self.base + len(self.path(i)) - 1 for i in range(len(self))], np.int32)

    @property
    def masks(self) -> np.ndarray:
        words = [sum(1 << j for j in self.path(i)) if i >= self.num_plain else 0 for i in range(len(self))]
        return np.array(words, np.uint32).view(np.int32)

    def seen(self, i: int, window: int) -> np.ndarray:
        """The keys that a token sees, by their places in the cache."""
        position = int(self.positions[i])
        first = max(position - window + 1, 0) if window else 0
        if i < self.num_plain:
            return np.arange(first, position + 1)
        return np.array([*range(min(first, self.base), self.base), *(self.base + j for j in self.path(i))])


def check_model(executor: Executor, reference: Executor, vocab: int, tolerance: float) -> None:
    """A step of several trees, beside rows of none: the logits of each path are those of a plain sequence."""
    rng = np.random.default_rng(seed := int(np.random.default_rng().integers(1 << 30)))
    shapes = [(9, 0, 7), (6, 2, 12), (11, 1), (3, 0, 20), (0, 1, 4)]
    sequences = [NewTokens.random(rng, *shape) for shape in shapes]
    tokens = [rng.integers(0, vocab, new.base + len(new)) for new in sequences]
    size = executor.page_size
    blocks = [-(-len(ids) // size) for ids in tokens]
    pages = np.split(rng.permutation(executor.num_pages)[: sum(blocks)], np.cumsum(blocks)[:-1])
    prompts = [NewTokens.random(rng, 0, new.base) for new in sequences]
    started = [i for i, new in enumerate(prompts) if len(new)]
    executor.step(_step([prompts[i] for i in started], [tokens[i] for i in started], [pages[i] for i in started], size))
    found = executor.step(_step(sequences, tokens, pages, size)).copy()
    assert executor.supports_trees
    row = 0
    for new, ids in zip(sequences, tokens, strict=True):
        for leaf in set(range(len(new))).difference(new.parents):
            path = new.path(leaf)
            plain = np.concatenate([ids[: new.base], ids[new.base + np.array(path)]])
            all_pages = np.arange(-(-len(plain) // size))
            step = _step([NewTokens.random(rng, 0, len(plain))], [plain], [all_pages], size)
            expected = reference.step(step)[new.base :]
            error = np.linalg.norm(found[row + np.array(path)] - expected) / np.linalg.norm(expected)
            assert error < tolerance, (seed, new, leaf, error)
        row += len(new)


def _step(
    sequences: Sequence[NewTokens], tokens: Sequence[np.ndarray], pages: Sequence[np.ndarray], size: int
) -> StepInput:
    """All rows' logits of a step with the sequences' new tokens; tokens: all of each, the new ones last."""
    lengths = [new.base + len(new) for new in sequences]
    places = [np.arange(new.base, length) for new, length in zip(sequences, lengths, strict=True)]
    table = np.zeros((len(sequences), max(map(len, pages))))
    for row, held in zip(table, pages, strict=True):
        row[: len(held)] = held
    arrays = {
        "input_ids": np.concatenate([ids[at] for ids, at in zip(tokens, places, strict=True)]),
        "positions": np.concatenate([new.positions for new in sequences]),
        "slot_mapping": np.concatenate([p[at // size] * size + at % size for p, at in zip(pages, places, strict=True)]),
        "block_table": table,
        "seq_lens": np.array(lengths),
        "query_start": np.cumsum([0, *map(len, sequences)]),
        "logit_rows": np.arange(sum(map(len, sequences))),
        "tree_masks": np.concatenate([new.masks for new in sequences]),
    }
    return StepInput(**{name: array.astype(np.int32) for name, array in arrays.items()})
