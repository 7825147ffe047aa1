"""The blocks that models are made of: plain causal attention over one sequence of n tokens.

Quantization, paging and fusion are passes; nothing here knows of them. Parameter names are HF's, so that checkpoints
need no renaming. Attention and rope are marked calls (`mlcgen.attention`, `mlcgen.rope`) that passes recognise.
"""

import numpy as np
from tvm import IRModule, relax
from tvm.ir import StringImm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec

from mlcgen.models.config import DecoderConfig
from mlcgen.models.rope import Rope

ATTENTION = "mlcgen.attention"  # (q, k, v, layer, mask, window): q (n, heads, d), k and v (n, kv_heads, d)
ROPE = "mlcgen.rope"  # (x, cos, sin): x (n, heads, d), cos and sin (n, d/2)


def attention(q: Tensor, k: Tensor, v: Tensor, layer: int, window: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with a causal mask; kv heads are shared by heads/kv_heads query heads.

    window: last tokens that a token sees, itself included; 0: all before it.
    """
    args = [q._expr, k._expr, v._expr, relax.prim_value(layer), StringImm("causal"), relax.prim_value(window)]
    return op.wrap_nested(relax.call_pure_packed(ATTENTION, *args, ty_args=q._expr.ty), "attention")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin over pairs (i, i + d/2)."""
    call = relax.call_pure_packed(ROPE, x._expr, cos._expr, sin._expr, ty_args=x._expr.ty)
    return op.wrap_nested(call, "rope")


def rope_table(positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """cos and sin, (n, d/2) each, from positions (n,)."""
    inv_freq = Tensor(_expr=relax.const(np.array([rope.inv_freq], "float32")))  # (1, d/2)
    angles = op.multiply(op.unsqueeze(op.astype(positions, "float32"), 1), inv_freq)
    factor = Tensor.from_scalar(rope.attention_factor, "float32")
    cos = op.wrap_nested(relax.op.cos(angles._expr), "cos")
    sin = op.wrap_nested(relax.op.sin(angles._expr), "sin")
    return (cos, sin) if rope.attention_factor == 1.0 else (op.multiply(cos, factor), op.multiply(sin, factor))


class Attention(nn.Module):  # type: ignore[misc]
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.window
        self.q_proj = nn.Linear(config.hidden_size, config.q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.q_size, config.hidden_size, bias=config.o_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = (
            op.reshape(projection(x), (n, projection.out_features // self.head_dim, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, self.layer, self.window)  # (n, heads, head_dim)
        return self.o_proj(op.reshape(out, (n, self.o_proj.in_features)))


class MLP(nn.Module):  # type: ignore[misc]
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(op.multiply(op.silu(self.gate_proj(x)), self.up_proj(x)))


class DecoderLayer(nn.Module):  # type: ignore[misc]
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        self.input_layernorm = nn.RMSNorm(config.hidden_size, -1, config.norm_eps, bias=False)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, -1, config.norm_eps, bias=False)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = op.add(x, self.self_attn(self.input_layernorm(x), cos, sin))
        return op.add(x, self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):  # type: ignore[misc]
    def __init__(self, config: DecoderConfig) -> None:
        self.rope = config.rope
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, -1, config.norm_eps, bias=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        cos, sin = rope_table(positions, self.rope)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class CausalLM(nn.Module):  # type: ignore[misc]
    def __init__(self, config: DecoderConfig) -> None:
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tied = config.tie_word_embeddings

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.model(input_ids, positions)
        if self.tied:
            return op.matmul(x, op.permute_dims(self.model.embed_tokens.weight))
        return self.lm_head(x)


def export(config: DecoderConfig) -> tuple[IRModule, list[str]]:
    """The module with one function `forward(input_ids (n,) int32, positions (n,) int32, *parameters) -> logits
    (n, vocab) float32`, and the parameters' HF names in the order of the arguments."""
    model = CausalLM(config)
    inputs = {name: spec.Tensor(["n"], "int32") for name in ("input_ids", "positions")}
    mode = {"param_mode": "plain", "effect_mode": "none"}
    mod, parameters = model.export_tvm(spec={"forward": {**inputs, "$": mode}})
    return mod, [name for name, _ in parameters]
