"""How low-rank adapters lie in memory: the contract between the pass that adds their path, the kernels and the runtime.

An adapter changes a projection y = x W^T into y + x A^T B^T, A (rank, K) and B (N, rank) with its scale in B (LoRA, Hu
et al. 2021). As many adapters as there are slots are loaded at once, each padded with zeros to the largest rank R.
Projections that are computed as one (q, k and v; gate and up) are a group of P parts, with two buffers:

lora_a_<group>  (slots, ceil(P * R / 16), K, 16)       row r of part p is row p * R + r, in tiles of 16 rows
lora_b_<group>  (slots, sum of ceil(N_p / 16), R, 16)  the parts one after the other, each in tiles of 16 rows

Both are float32 or float16, and zeros where there is nothing. An input, adapter_slots (n,) int32, says which slot each
token's adapter is in, -1 being none.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlcgen.formats import TILE

SLOTS = "adapter_slots"
MAX_RANK, MAX_SLOTS = 256, 1024


@dataclass(frozen=True)
class AdapterLimits:
    """What an artifact makes room for."""

    rank: int  # the largest
    slots: int  # adapters at once
    dtype: str  # float32 or float16


@dataclass(frozen=True)
class ProjectionGroup:
    """Projections of one input that are computed together."""

    projections: tuple[str, ...]  # their names in the model: model.layers.0.self_attn.q_proj, …
    in_features: int  # K
    out_features: tuple[int, ...]  # N of each

    def a_shape(self, limits: AdapterLimits) -> tuple[int, ...]:
        return limits.slots, num_tiles(len(self.projections) * limits.rank), self.in_features, TILE

    def b_shape(self, limits: AdapterLimits) -> tuple[int, ...]:
        return limits.slots, sum(map(num_tiles, self.out_features)), limits.rank, TILE


@dataclass(frozen=True)
class AdapterLayout:
    limits: AdapterLimits
    groups: tuple[ProjectionGroup, ...]
    arguments: tuple[str, ...]  # of the function with the low-rank path, in order, without the weights

    @property
    def buffers(self) -> dict[str, tuple[int, ...]]:
        """Shapes of lora_a_<group> and lora_b_<group>, in the order of groups."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, group in enumerate(self.groups):
            shapes |= {f"lora_a_{i}": group.a_shape(self.limits), f"lora_b_{i}": group.b_shape(self.limits)}
        return shapes

    def to_json(self) -> dict[str, Any]:
        groups = [
            {"projections": list(g.projections), "in_features": g.in_features, "out_features": list(g.out_features)}
            for g in self.groups
        ]
        return {**asdict(self.limits), "groups": groups, "arguments": list(self.arguments)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AdapterLayout":
        """What `to_json` gave; artifact.read_manifest has checked it."""
        groups = [
            ProjectionGroup(tuple(g["projections"]), g["in_features"], tuple(g["out_features"]))
            for g in value["groups"]
        ]
        limits = AdapterLimits(value["rank"], value["slots"], value["dtype"])
        return cls(limits, tuple(groups), tuple(value["arguments"]))


def num_tiles(rows: int) -> int:
    return -(-rows // TILE)
