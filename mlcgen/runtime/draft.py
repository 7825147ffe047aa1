"""Guessed tokens that one step verifies, as a tree (SpecInfer, Miao et al., 2024). A chain is a tree too."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mlcgen.runtime.distribution import Distribution

__all__ = ["MAX_ROWS", "MAX_TREE", "ROOT", "Draft"]

ROOT = -1  # the sequence's last token, which a draft goes on from
MAX_ROWS = 128  # rows of logits of a step with drafts: any artifact and device can be asked for so many
MAX_TREE = 32  # tokens of one step of a sequence with a tree: bits of a mask


@dataclass
class Draft:
    """Node i has the token `tokens[i]`, which comes after that of the node `parents[i]`, a lower number or ROOT."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    proposals: list[Distribution] = field(default_factory=list)
    """Of a chain that was drawn at random: what each token was drawn from."""
    is_forced: bool = False
    """Whether a chain's tokens are all that a grammar allows."""
    is_trusted: bool = False
    """Whether a chain's tokens are taken whatever the model says."""

    @classmethod
    def chain(cls, tokens: Sequence[int], proposals: Sequence[Distribution] = ()) -> "Draft":
        return cls(list(tokens), list(range(ROOT, len(tokens) - 1)), list(proposals))

    @classmethod
    def merged(cls, chains: Iterable[Sequence[int]]) -> "Draft":
        """The tree of some chains, where their common beginnings are one."""
        draft = cls()
        children: dict[tuple[int, int], int] = {}
        for chain in chains:
            node = ROOT
            for token in chain:
                if (node, token) not in children:
                    children[node, token] = draft.add(node, token)
                node = children[node, token]
        return draft

    def add(self, parent: int, token: int) -> int:
        """A new node's number."""
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trunk(self) -> list[int]:
        """The tokens of the chain that begins the draft."""
        length = next((node for node, parent in enumerate(self.parents) if parent != node - 1), len(self))
        return self.tokens[:length]

    @property
    def is_chain(self) -> bool:
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    @property
    def depths(self) -> list[int]:
        """How many tokens each node is after the last one."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def child(self, node: int, token: int | None) -> int | None:
        """The node after `node` with that token, if there is one."""
        for index in range(node + 1, len(self.tokens)):
            if self.parents[index] == node and self.tokens[index] == token:
                return index
        return None

    def chosen(self, node: int, token: int) -> int:
        """What comes after `node`, where the model chose `token`."""
        return self.tokens[node + 1] if self.is_trusted and node + 1 < len(self.tokens) else token

    def proposal(self, node: int) -> tuple[int, Distribution] | None:
        """Of a chain that was drawn: the token after `node`, and what it was drawn from."""
        return (self.tokens[node + 1], self.proposals[node + 1]) if node + 1 < len(self.proposals) else None

    def shorten(self, count: int) -> None:
        """To the first nodes, so many at most."""
        del self.tokens[count:], self.parents[count:], self.proposals[count:]

    def masks(self, num_known: int) -> list[int]:
        """For the known tokens of a step and then each node: which of these it sees, a bit each; 0: those before it."""
        masks: list[int] = []
        known = (1 << num_known) - 1
        for node, parent in enumerate(self.parents):
            masks.append((known if parent == ROOT else masks[parent]) | 1 << (num_known + node))
        return [0] * num_known + masks
