// A stored matrix (mlcgen/formats.py) by units: UNIT columns of a quad, which is 4 rows that start at a multiple of 4.
// Each column of a unit is a vec4 over the quad's rows. A tile of 16 rows holds 4 quads side by side.
const K = {{ K }}u;
const UNIT = {{ UNIT }}u;
const UNITS = K / UNIT;
alias Unit = array<vec4<f32>, UNIT>;

fn halves(words: vec2<u32>) -> vec4<f32> {
% if fmt.dtype == "uint16"
  return bitcast<vec4<f32>>(vec4<u32>(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u));
% else
  return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
% endif
}

% if fmt.is_grouped
// A unit as it is stored: a word of each row.
alias Words = vec4<u32>;

fn words_of(quad: u32, unit: u32) -> Words { return w[(quad / 4u * UNITS + unit) * 4u + quad % 4u]; }

// 1 + code / CODES: with a code as the upper bits of its fraction, 1.0 in half precision becomes that, and two of them
// become floats at once. Byte j % 4 of a row's word is column j; its high half holds the second four columns of 4 bits.
const CODES = {{ 2 ** fmt.bits }}.0;

fn unit_of(words: Words) -> Unit {
  % set mask = "0x03c003c0u" if fmt.bits == 4 else "0x03fc03fcu"
  % set pairs = [(0, "<<6"), (1, ">>2"), (4, "<<2"), (5, ">>6")] if fmt.bits == 4 else [(0, "<<2"), (1, ">>6")]
  % for first, shift in pairs
  let pair{{ first }} = ((words {{ shift[:2] }} vec4<u32>({{ shift[-1] }}u)) & vec4<u32>({{ mask }})) | vec4<u32>(0x3c003c00u);
    % for row in "xyzw"
  let {{ row }}{{ first }} = unpack2x16float(pair{{ first }}.{{ row }});
    % endfor
  % endfor
  return Unit(
  % for j in range(UNIT)
    {% set first, half = j - j % 4 + j % 2, "xy"[j % 4 // 2] %}vec4<f32>(x{{ first }}.{{ half }}, y{{ first }}.{{ half }}, z{{ first }}.{{ half }}, w{{ first }}.{{ half }}),
  % endfor
  );
}

// A weight is (1 + code / CODES) * scale + offset.
struct Scale { scale: vec4<f32>, offset: vec4<f32> }

fn scale_of(quad: u32, unit: u32) -> Scale {
  let at = (quad / 4u * {{ K // fmt.group }}u + unit / {{ fmt.group // UNIT }}u) * 4u + quad % 4u;
  let s = halves(scale[at]);
  % if fmt.has_minimum
  return Scale(s * CODES, halves(minimum[at]) - s * CODES);
  % else
  return Scale(s * CODES, s * -(CODES + {{ fmt.zero_point }}.0));
  % endif
}

fn weights_of(quad: u32, unit: u32) -> Unit {
  let codes = unit_of(words_of(quad, unit));
  let s = scale_of(quad, unit);
  return Unit(
  % for j in range(UNIT)
    codes[{{ j }}] * s.scale + s.offset,
  % endfor
  );
}
% else
% set word = "vec4<f32>" if fmt.bits == 32 else "vec2<u32>"
alias Words = array<{{ word }}, UNIT>;

fn word_of(quad: u32, column: u32) -> {{ word }} { return w[(quad / 4u * K + column) * 4u + quad % 4u]; }

fn words_of(quad: u32, unit: u32) -> Words {
  let k = unit * UNIT;
  return Words(word_of(quad, k), word_of(quad, k + 1u), word_of(quad, k + 2u), word_of(quad, k + 3u));
}

fn unit_of(words: Words) -> Unit {
  % set decode = "words[%d]" if fmt.bits == 32 else "halves(words[%d])"
  return Unit({% for j in range(UNIT) %}{{ decode % j }}{{ ", " if j < UNIT - 1 }}{% endfor %});
}

fn weights_of(quad: u32, unit: u32) -> Unit { return unit_of(words_of(quad, unit)); }
% endif
