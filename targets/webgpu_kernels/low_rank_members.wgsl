// What tokens share: of TOKENS neighbouring ones, the first of each adapter computes for all that have it.
const TOKENS = {{ TOKENS }}u;

// Those that have one's adapter, a bit each; none where an earlier one has it.
struct Members { bits: u32, slot: i32 }

var<workgroup> members: Members;

fn members_of(token: u32) -> Members {
  let slot = slots[token];
  let first = token - token % TOKENS;
  var bits = 0u;
  for (var i = 0u; i < TOKENS && first + i < u32(numbers.n); i++) {
    if (slots[first + i] == slot) { bits |= 1u << i; }
  }
  if ((bits & ((1u << (token - first)) - 1u)) != 0u) { bits = 0u; }
  return Members(bits, slot);
}

// Four rows of A or B.
% if IS_HALF
fn rows_of(words: vec2<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y)); }
% else
fn rows_of(words: vec4<f32>) -> vec4<f32> { return words; }
% endif
