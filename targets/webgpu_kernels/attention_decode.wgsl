// Attention of one new token of each sequence over a paged cache. A workgroup takes ROWS query heads that share a
// key/value head, and of the sequence's keys all, or with SPLIT numbers.span; it goes through them KEYS at a time, as
// vectors of 4 columns: logits by LANES invocations a key, an online softmax, the weighted sum of values.
//
// With SPLIT it leaves unnormalized sums, the largest logit and the sum of weights for attention_combine.wgsl.
//
// q, out (n, H, D / 4) vec4; pages (num_pages, 2, KV, PAGE, D / 4) vec4; block_table (seqs, blocks); seq_lens (seqs);
// partials (seqs, H, splits, D / 4 + 1) vec4. Grid: (KV * ceil(GROUP / ROWS), splits, seqs).
{{ HEAD }}
const KV = {{ KV }}u;
const GROUP = {{ GROUP }}u; // query heads of a key/value head
const ROWS = {{ ROWS }}u;
const ROW_TILES = {{ (GROUP + ROWS - 1) // ROWS }}u;
const VECTORS = {{ D // 4 }}u; // of a head
const PAGE = {{ PAGE }}u;
const KEYS = 32u;
const LANES = 8u;
const MASKED = -1e30;
% set sharers = THREADS // (D // 4)
const SHARERS = {{ sharers }}u; // invocations that share a vector of the output

var<workgroup> queries: array<vec4<f32>, ROWS * VECTORS>;
// Of a key (KEYS, LANES + 1): a part of each row's logit; at the end (ROWS, THREADS) sums of values.
var<workgroup> staged: array<vec4<f32>, {{ [32 * 9, ROWS * THREADS] | max }}>;
var<workgroup> logits: array<f32, ROWS * KEYS>;
var<workgroup> weights: array<f32, ROWS * KEYS>;
var<workgroup> key_at: array<u32, 2u * KEYS>; // of this round and the next
var<workgroup> factors: array<f32, ROWS>;
var<workgroup> totals: array<f32, ROWS * SHARERS>;
var<workgroup> largest_logits: array<f32, ROWS>;

{% include "attention_cache.wgsl" %}

// Of the weights so far: a row's largest logit, and what its sums must be scaled by.
struct Softmax { largest: f32, weight: f32, factor: f32 }

fn softmax(row: u32, key: u32, before: f32) -> Softmax {
  var largest = before;
  for (var k = 0u; k < KEYS; k++) { largest = max(largest, logits[row * KEYS + k]); }
  return Softmax(largest, exp(logits[row * KEYS + key] - largest), exp(before - largest));
}

{{ ENTRY }} {
  let length = seq_lens[group.z];
  let seen = {{ "max(length - %d, 0)" % WINDOW if WINDOW else "0" }};
  let first = seen{{ " + i32(group.y) * numbers.span" if SPLIT }};
  let end = {{ "min(first + numbers.span, length)" if SPLIT else "length" }};
  if (first >= end) { return; }
  let kv = group.x / ROW_TILES;
  let first_row = group.x % ROW_TILES * ROWS;
  let first_head = (group.z * KV + kv) * GROUP;
  for (var i = thread; i < ROWS * VECTORS; i += {{ THREADS }}u) {
    let head = first_head + min(first_row + i / VECTORS, GROUP - 1u); // rows past the last stand for it
    queries[i] = q[head * VECTORS + i % VECTORS] * numbers.scale;
  }
  workgroupBarrier();

  let lane = thread % LANES;
  let vector = thread % VECTORS;
  let sharer = thread / VECTORS;
  var largest = MASKED; // of row thread / KEYS
  % for r in range(ROWS)
  var sum{{ r }} = vec4<f32>(0.0);
  var total{{ r }} = 0.0;
  % endfor
  var round = 0u;
  for (var first_key = first; first_key < end; first_key += i32(KEYS)) {
    for (var key = thread / LANES; key < KEYS; key += {{ THREADS }}u / LANES) {
      let at = vector_at(group.z, kv, min(u32(first_key) + key, u32(end) - 1u));
      if (lane == 0u) { key_at[round * KEYS + key] = at; }
      var parts = vec4<f32>(0.0);
      for (var v = lane; v < VECTORS; v += LANES) {
        let k = cached_vector(at + v);
  % for r in range(ROWS)
        parts[{{ r }}] += dot(queries[{{ r }}u * VECTORS + v], k);
  % endfor
      }
      staged[key * (LANES + 1u) + lane] = parts;
    }
    workgroupBarrier();
    let row = thread / KEYS;
    let key = thread % KEYS;
    if (row < ROWS) {
      var logit = 0.0;
      for (var i = 0u; i < LANES; i++) { logit += staged[key * (LANES + 1u) + i][row]; }
      logits[row * KEYS + key] = select(MASKED, logit, first_key + i32(key) < end);
    }
    workgroupBarrier();
    if (row < ROWS) {
      let found = softmax(row, key, largest);
      largest = found.largest;
      weights[row * KEYS + key] = found.weight;
      if (key == 0u) { factors[row] = found.factor; }
    }
    workgroupBarrier();
    if (sharer < SHARERS) {
  % for r in range(ROWS)
      sum{{ r }} *= factors[{{ r }}];
      total{{ r }} *= factors[{{ r }}];
  % endfor
      for (var k = sharer; k < KEYS; k += SHARERS) {
        let value = cached_vector(key_at[round * KEYS + k] + KV * PAGE * VECTORS + vector);
  % for r in range(ROWS)
        sum{{ r }} += weights[{{ r }}u * KEYS + k] * value;
        total{{ r }} += weights[{{ r }}u * KEYS + k];
  % endfor
      }
    }
    round = 1u - round;
  }

  if (thread % KEYS == 0u && thread / KEYS < ROWS) { largest_logits[thread / KEYS] = largest; }
  % for r in range(ROWS)
  staged[{{ r * THREADS }}u + thread] = sum{{ r }};
  if (vector == 0u && sharer < SHARERS) { totals[{{ r }}u * SHARERS + sharer] = total{{ r }}; }
  % endfor
  workgroupBarrier();
  for (var i = thread; i < ROWS * VECTORS; i += {{ THREADS }}u) {
    let row = i / VECTORS;
    if (first_row + row >= GROUP) { continue; }
    var sum = vec4<f32>(0.0);
    var total = 0.0;
    for (var s = 0u; s < SHARERS; s++) {
      sum += staged[row * {{ THREADS }}u + s * VECTORS + i % VECTORS];
      total += totals[row * SHARERS + s];
    }
    let head = first_head + first_row + row;
  % if SPLIT
    let to = (head * u32(numbers.splits) + group.y) * (VECTORS + 1u);
    partials[to + i % VECTORS] = sum;
    if (i % VECTORS == 0u) { partials[to + VECTORS] = vec4<f32>(largest_logits[row], total, 0.0, 0.0); }
  % else
    out[head * VECTORS + i % VECTORS] = sum / total;
  % endif
  }
}
