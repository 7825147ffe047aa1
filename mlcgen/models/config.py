"""The shape of a decoder-only model, read strictly from HF config fields. No compiler in here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlcgen.errors import CheckpointError, UnsupportedError
from mlcgen.models.rope import Rope, parse_rope

# Fields that change nothing at inference.
IGNORED = frozenset({
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "initializer_range", "attention_dropout", "hidden_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "generation_eos_token_id", "auto_map", "transformers.js_config", "is_llama_config",
    "_name_or_path", "name_or_path", "return_dict", "output_attentions", "output_hidden_states", "id2label",
    "label2id", "problem_type", "chunk_size_feed_forward", "max_window_layers", "_attn_implementation",
    "unsloth_version", "unsloth_fixed", "vocab_file",
})  # fmt: skip
# Fields that may hold only these values: anything else is a model that we would get wrong.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "use_sliding_window": (False, None),
}
ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that the shared blocks need to know of a decoder-only transformer."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: Rope
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    window: int = 0  # last tokens that a token sees, itself included; 0: all

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


class Fields:
    """HF config fields with their types checked; remembers which were read so that the rest can be refused."""

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self.hf = hf
        self.read: set[str] = set()

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        self.read.add(name)
        value = self.hf.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"config.json has no {name!r}; {self.hf.get('model_type')} needs it")
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"config field {name!r} = {value!r} should be of type {kind.__name__}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        value: int = self.get(name, int, default)
        if not 0 < value < 1 << 31:
            raise CheckpointError(f"config field {name!r} = {value} is not a sensible size")
        return value

    def refuse_rest(self, also_read: Iterable[str] = ()) -> None:
        """Raise for each field that nobody honours and that says something (None, False, 0 say nothing)."""
        known = self.read | IGNORED | ROPE_FIELDS | set(also_read)
        for name, value in self.hf.items():
            if name in FIXED:
                if value not in FIXED[name]:
                    raise UnsupportedError(
                        f"config field {name!r} = {value!r} is not supported; have: {FIXED[name][0]!r}"
                    )
            elif name not in known and value:
                raise UnsupportedError(f"config field {name!r} = {value!r} is not supported by {self.hf['model_type']}")


def parse_window(hf: Mapping[str, Any], default: int) -> int:
    """`sliding_window`; 0 where it is null, which means all tokens."""
    is_null = "sliding_window" in hf and hf["sliding_window"] is None
    return 0 if is_null else Fields(hf).size("sliding_window", default)


def parse_decoder(hf: Mapping[str, Any], also_read: Iterable[str] = (), **architecture: Any) -> DecoderConfig:
    """The fields that all Llama-like models share; `architecture` adds or overrides what is special to one."""
    fields = Fields(hf)
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    head_dim = fields.size("head_dim", max(hidden // heads, 1))
    if heads % kv_heads:
        raise CheckpointError(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    if head_dim % 2:
        raise CheckpointError(f"head_dim = {head_dim} is odd; rotary embeddings need pairs")
    max_positions = fields.size("max_position_embeddings", 2048)
    values: dict[str, Any] = {
        "model_type": hf["model_type"],
        "hidden_size": hidden,
        "intermediate_size": fields.size("intermediate_size"),
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": fields.size("vocab_size"),
        "max_position_embeddings": max_positions,
        "norm_eps": fields.get("rms_norm_eps", float, 1e-6),
        "rope": parse_rope(hf, head_dim, max_positions),
        "tie_word_embeddings": fields.get("tie_word_embeddings", bool, False),
    }
    fields.refuse_rest(also_read)
    return DecoderConfig(**{**values, **architecture})
