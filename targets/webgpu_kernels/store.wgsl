// The end of a product: 4 rows of a token, with what stands around them. `up` is the other half where GATED.
fn store(token: u32, local_row: u32, product: vec4<f32>, up: vec4<f32>) {
  let row = local_row{{ " + u32(numbers.first_row)" if SPLIT }};
  let count = {{ "1u" if TOKENS == 1 else "u32(numbers.n)" }};
  if (token >= count) { return; }
  for (var i = 0u; i < 4u && row + i < {{ "u32(numbers.end_row)" if SPLIT else "OUT" }}; i++) {
    var value = product[i]{{ " + bias[row + i]" if HAS_BIAS }};
    % if GATED
    value = value / (1.0 + exp(min(-value, 80.0))) * (up[i]{{ " + bias[OUT + row + i]" if HAS_BIAS }});
    % endif
    let at = token * OUT + row + i;
    out[at] = value{{ " + residual[at]" if HAS_RESIDUAL }};
  }
}
