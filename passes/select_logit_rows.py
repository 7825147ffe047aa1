"""Only the rows that will be sampled go through the last norm and the output matrix, the model's largest."""

from tvm import IRModule, relax, tirx

from mlcgen.passes.rewrite import FORWARD, Rewriter, bindings, is_op, rewrite


def select_logit_rows(mod: IRModule) -> IRModule:
    """Adds the input `logit_rows` (rows,) int32; the result becomes (rows, vocab)."""
    values = bindings(mod)
    logits = mod[FORWARD].body.body
    while not is_op(values[logits], "relax.matmul"):
        logits = values[logits] if isinstance(values[logits], relax.Var) else values[logits].args[0]
    rows = relax.Var("logit_rows", relax.TensorType((tirx.Var("rows", "int64"),), "int32"))

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if not var.same_as(logits):
            return None
        norm = rewriter.value(value.args[0])
        has_norm = is_op(norm, "relax.nn.rms_norm")
        hidden = norm.args[0] if has_norm else value.args[0]
        hidden = rewriter.emit(relax.op.take(hidden, rows, axis=0, mode="clip"), "sampled_hidden")
        if has_norm:  # rows are normalized one by one: the order does not matter
            hidden = rewriter.emit(relax.op.nn.rms_norm(hidden, norm.args[1], [-1], norm.attrs.epsilon))
        return relax.op.matmul(hidden, value.args[1])

    return rewrite(mod, rule, new_inputs=[rows])
