"""The reference lowering: marked attention and rope written out in plain operators over one contiguous sequence.

Used for the reference build that `verify` and the tests compare against: no quantization, no pages, no fusion.
"""

from tvm import IRModule, relax

from mlcgen.models.layers import ATTENTION
from mlcgen.passes.fuse_rope import write_out_rope
from mlcgen.passes.rewrite import Rewriter, is_marked, rewrite


def plain_attention(mod: IRModule) -> IRModule:
    """softmax(q k^T / sqrt(d) + causal mask) v for every `mlcgen.attention`, O(n^2) memory."""

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if not is_marked(value, ATTENTION):
            return None
        q, k, v = value.args[1:4]
        return _attend(rewriter, q, k, v, int(value.args[6].value))

    return rewrite(write_out_rope(mod), rule)


def _attend(rewriter: Rewriter, q: relax.Expr, k: relax.Expr, v: relax.Expr, window: int) -> relax.Expr:
    emit, op = rewriter.emit, relax.op
    n, heads, head_dim = q.ty.shape
    groups = int(heads) // int(k.ty.shape[1])
    q, k, v = (emit(op.permute_dims(x, [1, 0, 2])) for x in (q, k, v))  # (heads, n, d)
    k, v = (emit(op.repeat(x, groups, axis=0)) if groups > 1 else x for x in (k, v))
    scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 2, 1]))))  # (heads, n, n)
    scores = emit(op.multiply(scores, relax.const(int(head_dim) ** -0.5, "float32")))
    allowed = emit(op.tril(emit(op.ones((n, n), "float32"))))
    if window:
        allowed = emit(op.triu(allowed, 1 - window))
    masked = emit(op.multiply(emit(op.subtract(allowed, relax.const(1.0, "float32"))), relax.const(1e30, "float32")))
    weights = emit(op.nn.softmax(emit(op.add(scores, masked)), axis=-1))
    return op.permute_dims(emit(op.matmul(weights, v)), [1, 0, 2])
