// out (seqs, H, D / 4) vec4 from what the workgroups of a sequence left: partials (seqs, H, splits, D / 4 + 1) vec4.
// Grid: (H, seqs); an invocation for each vector.
{{ HEAD }}
const VECTORS = {{ D // 4 }}u;

{{ ENTRY }} {
  let length = {{ "min(seq_lens[group.y], %d)" % WINDOW if WINDOW else "seq_lens[group.y]" }};
  let count = u32((length + numbers.span - 1) / numbers.span);
  if (count == 0u || thread >= VECTORS) { return; }
  let head = group.y * {{ H }}u + group.x;
  let first = head * u32(numbers.splits) * (VECTORS + 1u);
  var largest = partials[first + VECTORS].x;
  for (var i = 1u; i < count; i++) { largest = max(largest, partials[first + i * (VECTORS + 1u) + VECTORS].x); }
  var sum = vec4(0.0);
  var total = 0.0;
  for (var i = 0u; i < count; i++) {
    let at = first + i * (VECTORS + 1u);
    let part = partials[at + VECTORS];
    let factor = exp(part.x - largest);
    sum += partials[at + thread] * factor;
    total += part.y * factor;
  }
  out[head * VECTORS + thread] = sum / total;
}
