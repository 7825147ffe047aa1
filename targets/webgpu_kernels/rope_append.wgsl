// Rotary embedding (Su et al. 2021, pairs (i, i + D / 2)) of queries and keys, and keys and values into the cache.
//
// An invocation takes columns i and i + 1 with i + D / 2 and i + 1 + D / 2, so that it writes whole words of a page:
// indices below count pairs of neighbours. qkv (n, H + 2 KV, D / 2) vec2; cos, sin (n, D / 4) vec2; slots (n),
// negative: nothing is stored; pages (num_pages, 2, KV, PAGE, D / 2); q (n, H, D / 2) vec2.
// Grid: (ceil((H + 2 KV) * D / 4 / THREADS), n).
{{ HEAD }}
const H = {{ H }}u;
const KV = {{ KV }}u;
const PAGE = {{ PAGE }}u;
const PAIRS = {{ D // 2 }}u; // of a head
const TURNS = PAIRS / 2u;

% if KV_DTYPE == "float32"
fn stored(pair: vec2<f32>) -> vec2<f32> { return pair; }
% elif KV_DTYPE == "float16"
fn stored(pair: vec2<f32>) -> u32 { return pack2x16float(pair); }
% else
fn stored(pair: vec2<f32>) -> u32 { // rounded to the nearest, ties to even
  let bits = bitcast<vec2<u32>>(pair);
  let rounded = (bits + vec2(0x7fffu) + ((bits >> vec2(16u)) & vec2(1u))) >> vec2(16u);
  return rounded.x | (rounded.y << 16u);
}
% endif

{{ ENTRY }} {
  let token = group.y;
  let at = group.x * {{ THREADS }}u + thread;
  let head = at / TURNS;
  let i = at % TURNS;
  if (head >= H + 2u * KV) { return; }
  let x = (token * (H + 2u * KV) + head) * PAIRS + i;
  var a = qkv[x];
  var b = qkv[x + TURNS];
  if (head < H + KV) {
    let c = cos[token * TURNS + i];
    let s = sin[token * TURNS + i];
    let turned = a * c - b * s;
    b = b * c + a * s;
    a = turned;
  }
  if (head < H) {
    let to = (token * H + head) * PAIRS + i;
    q[to] = a;
    q[to + TURNS] = b;
    return;
  }
  if (slots[token] < 0) { return; }
  let slot = u32(slots[token]);
  let is_value = (head - H) / KV;
  let to = (((slot / PAGE * 2u + is_value) * KV + (head - H) % KV) * PAGE + slot % PAGE) * PAIRS + i;
  pages[to] = stored(a);
  pages[to + TURNS] = stored(b);
}
