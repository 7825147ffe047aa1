"""PyTorch as a peer on GPUs: a plain Llama in float16, its blocks through torch.compile, decoding in a CUDA graph.

What gpt-fast does, for the shapes of an artifact's model; the weights are random.
"""

from time import perf_counter
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from mlcgen import artifact
from mlcgen.bench.engines import Prompts, Spec, Timing

MULTIPLE = 64  # a cache's tokens


class TorchCompile:
    def __init__(self, spec: Spec) -> None:
        config = artifact.read_manifest(spec.model)["model"]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        with torch.device(self.device), torch.no_grad():
            torch.set_default_dtype(dtype)
            self.model = Llama(config, spec.context + MULTIPLE)
            torch.set_default_dtype(torch.float32)
        for block in self.model.blocks:
            block.compile(dynamic=False)
        self._decoders: dict[tuple[int, int], Any] = {}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def generate(self, prompts: Prompts, tokens: int) -> Timing:
        ids = torch.tensor([list(p) for p in prompts], device=self.device)
        batch, prompt = ids.shape
        decoder = self._decoder(batch, -(-(prompt + tokens) // MULTIPLE) * MULTIPLE)
        self._synchronize()
        start = perf_counter()
        token = self.model(ids, torch.arange(prompt, device=self.device), decoder.caches)
        self._synchronize()
        first = perf_counter()
        if tokens == 1:
            return Timing(first - start, None)
        decoder.record()
        self._synchronize()
        begin = perf_counter()
        for i in range(tokens - 1):
            token = decoder.step(token, prompt + i)
        self._synchronize()
        return Timing(first - start, batch * (tokens - 1) / (perf_counter() - begin))

    def _decoder(self, batch: int, context: int) -> "Decoder":
        if (batch, context) not in self._decoders:
            self._decoders[batch, context] = Decoder(self.model, batch, context, self.device)
        return self._decoders[batch, context]

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Decoder:
    """Steps of one size, recorded as a graph where there is a GPU. Each attends to a whole cache, so it is no larger
    than its test needs."""

    def __init__(self, model: "Llama", batch: int, context: int, device: str) -> None:
        self.model = model
        self.caches = [block.new_cache(batch, context) for block in model.blocks]
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.graph: Any = None
        self.next: Any = None

    def record(self) -> None:
        if self.graph is not None or not torch.cuda.is_available():
            return
        self.position.fill_(self.caches[0][0].shape[2] - 1)  # no prompt is there
        for _ in range(3):
            self.model(self.token, self.position, self.caches)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.next = self.model(self.token, self.position, self.caches)

    def step(self, token: Any, position: int) -> Any:
        self.token.copy_(token)
        self.position.fill_(position)
        if self.graph is None:
            return self.model(self.token, self.position, self.caches)
        self.graph.replay()
        return self.next


class Llama(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, config: dict[str, Any], context: int) -> None:
        super().__init__()
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        self.embed = torch.nn.Embedding(vocab, hidden)
        self.blocks = torch.nn.ModuleList([Block(config) for _ in range(config["num_layers"])])
        self.norm = torch.nn.RMSNorm(hidden, config["norm_eps"])
        self.head = torch.nn.Linear(hidden, vocab, bias=False)
        half = config["head_dim"] // 2
        angles = torch.arange(context).float()[:, None] * 10000.0 ** (-torch.arange(half).float() / half)
        self.table = torch.stack([angles.cos(), angles.sin()]).to(self.embed.weight.dtype)
        self.mask = torch.ones(context, context, dtype=torch.bool).tril()

    def forward(self, ids: Any, positions: Any, caches: list[Any]) -> Any:
        """ids (batch, n) at positions (n,) -> the most likely next token, (batch, 1)."""
        context = caches[0][0].shape[2]
        x, table, mask = self.embed(ids), self.table[:, positions], self.mask[positions, :context]
        for block, (keys, values) in zip(self.blocks, caches, strict=True):
            x = block(x, table, mask, positions, keys, values)
        return self.head(self.norm(x[:, -1:])).argmax(-1)


class Block(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads, self.dim = config["num_heads"], config["num_kv_heads"], config["head_dim"]
        linear = torch.nn.Linear
        self.qkv = linear(hidden, (self.heads + 2 * self.kv_heads) * self.dim, bias=False)
        self.out = linear(self.heads * self.dim, hidden, bias=False)
        self.gate_up, self.down = linear(hidden, 2 * inner, bias=False), linear(inner, hidden, bias=False)
        self.norms = torch.nn.ModuleList([torch.nn.RMSNorm(hidden, config["norm_eps"]) for _ in range(2)])

    def new_cache(self, batch: int, context: int) -> list[Any]:
        """Keys and values (batch, heads, context, head size)."""
        return [self.out.weight.new_zeros(batch, self.kv_heads, context, self.dim) for _ in range(2)]

    def forward(self, x: Any, table: Any, mask: Any, positions: Any, keys: Any, values: Any) -> Any:
        batch, n, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, n, -1, self.dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = _rotate(q, table), _rotate(k, table)
        keys[:, :, positions] = k
        values[:, :, positions] = v
        if n > 1:  # a prompt, from its first token on
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, n, -1))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotate(x: Any, table: Any) -> Any:
    a, b = x.chunk(2, -1)
    cos, sin = table
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
