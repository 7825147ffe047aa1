// The most likely token of each row, of equal ones the first: of each of a row's PARTS, and then of the row.
//
// Logits are compared as unsigned numbers in the same order, where a NaN is larger than everything, so that it is
// noticed: what WGSL makes of comparisons with it is not defined.
// Grids: (PARTS, rows) and (1, rows).
{{ HEAD }}
var<workgroup> keys: array<u32, {{ THREADS }}>;
var<workgroup> places: array<u32, {{ THREADS }}>;

% if IS_FIRST
fn key_of(value: f32) -> u32 {
  let bits = bitcast<u32>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return 0xffffffffu; }
  if (bits == 0x80000000u) { return 0x80000000u; }  // -0 is 0
  if (bits >= 0x80000000u) { return ~bits; }
  return bits | 0x80000000u;
}
% else
fn value_of(key: u32) -> f32 {
  if (key >= 0x80000000u) { return bitcast<f32>(key ^ 0x80000000u); }
  return bitcast<f32>(~key);
}
% endif

{{ ENTRY }} {
  let row = group.y;
  var key = 0u;
  var place = 0u;
% if IS_FIRST
  let vocab = u32(numbers.vocab);
  let length = (vocab + {{ PARTS - 1 }}u) / {{ PARTS }}u;
  let end = min((group.x + 1u) * length, vocab);
  for (var i = group.x * length + thread; i < end; i += {{ THREADS }}u) {
    let other = key_of(logits[row * vocab + i]);
    if (other > key) {
      key = other;
      place = i;
    }
  }
% else
  if (thread < {{ PARTS }}u) {
    let at = 2u * (row * {{ PARTS }}u + thread);
    key = parts[at];
    place = parts[at + 1u];
  }
% endif
  keys[thread] = key;
  places[thread] = place;
  workgroupBarrier();
  for (var count = {{ THREADS // 2 }}u; count > 0u; count /= 2u) {
    if (thread < count) {
      let other = keys[thread + count];
      let is_first = other == keys[thread] && places[thread + count] < places[thread];
      if (other > keys[thread] || is_first) {
        keys[thread] = other;
        places[thread] = places[thread + count];
      }
    }
    workgroupBarrier();
  }
  if (thread == 0u) {
% if IS_FIRST
    let at = 2u * (row * {{ PARTS }}u + group.x);
    parts[at] = keys[0];
    parts[at + 1u] = places[0];
% else
    results[row] = places[0];
    results[u32(numbers.rows) + row] = bitcast<u32>(value_of(keys[0]));
% endif
  }
}
