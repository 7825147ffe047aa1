// A stored matrix (mlcgen/formats.py) by units: UNIT columns of a quad, which is 4 rows that start at a multiple of 4.
// Each column of a unit is a vec4 over the quad's rows. A tile of 16 rows holds 4 quads side by side.
const K = {{ K }}u;
const UNIT = {{ UNIT }}u;
const UNITS = K / UNIT;
alias Unit = array<vec4<f32>, UNIT>;

fn halves(words: vec2<u32>) -> vec4<f32> {
% if fmt.dtype == "uint16"
  return bitcast<vec4<f32>>(vec4(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u));
% else
  return vec4(unpack2x16float(words.x), unpack2x16float(words.y));
% endif
}

% if fmt.is_grouped
// Codes only. Byte j % 4 of a row's word is column j; its high half holds the second four columns of 4 bits.
fn unit_of(quad: u32, unit: u32) -> Unit {
  let words = w[(quad / 4u * UNITS + unit) * 4u + quad % 4u];
  return Unit(
  % for j in range(UNIT)
    vec4<f32>((words >> vec4({{ j % 4 * 8 + j // 4 * 4 }}u)) & vec4({{ 2 ** fmt.bits - 1 }}u)),
  % endfor
  );
}

// A weight is code * scale + offset.
struct Scale { scale: vec4<f32>, offset: vec4<f32> }

fn scale_of(quad: u32, unit: u32) -> Scale {
  let at = (quad / 4u * {{ K // fmt.group }}u + unit / {{ fmt.group // UNIT }}u) * 4u + quad % 4u;
  let s = halves(scale[at]);
  % if fmt.has_minimum
  return Scale(s, halves(minimum[at]));
  % else
  return Scale(s, s * -{{ fmt.zero_point }}.0);
  % endif
}

fn weights_of(quad: u32, unit: u32) -> Unit {
  let codes = unit_of(quad, unit);
  let s = scale_of(quad, unit);
  return Unit(
  % for j in range(UNIT)
    codes[{{ j }}] * s.scale + s.offset,
  % endfor
  );
}
% else
fn column_of(quad: u32, column: u32) -> vec4<f32> {
  let words = w[(quad / 4u * K + column) * 4u + quad % 4u];
  return {{ "words" if fmt.bits == 32 else "halves(words)" }};
}

fn weights_of(quad: u32, unit: u32) -> Unit {
  let k = unit * 4u;
  return Unit(column_of(quad, k), column_of(quad, k + 1u), column_of(quad, k + 2u), column_of(quad, k + 3u));
}
% endif
