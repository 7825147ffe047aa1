// Causal attention over paged caches. Rows are (token, head of the group) pairs, so that all heads of a group share
// what is read of the cache. A workgroup takes ROWS rows of one sequence and one key/value head and goes through the
// keys that they see, KEYS at a time: logits, an online softmax, the weighted sum of values.
//
// DECODE: each sequence has one new token; where SPLIT, a workgroup takes numbers.span of its keys, and leaves
// unnormalized sums, the largest logit and the sum of weights for attention_combine.wgsl.
//
// q, out (n, H, D / 4) vec4; pages (num_pages, 2, KV, PAGE, D / 4) vec4; block_table (seqs, blocks); seq_lens (seqs);
// query_start (seqs + 1); partials (seqs, H, splits, D / 4 + 1) vec4.
// Grid: (KV, row tiles of all sequences), or DECODE: (KV * row tiles of a group, splits, seqs).
const KV = {{ KV }}u;
const GROUP = {{ GROUP }}u; // query heads of a key/value head
const VECTORS = {{ D // 4 }}u; // of a head
const PAGE = {{ PAGE }}u;
const WINDOW = {{ WINDOW }};
const ROWS = {{ ROWS }}u;
const KEYS = 32u;
const CHUNK = 8u; // vectors of queries and keys at a time
const VALUES = {{ VALUES }}u; // keys whose values are there at a time
const MASKED = -1e30;
// Of a tile of logits, an invocation makes 4 rows by KEYS_EACH; of the output, ROWS_EACH by every LANES-th vector.
const KEYS_EACH = {{ KEYS_EACH }}u;
const ROWS_EACH = {{ ROWS_EACH }}u;
const LANES = {{ LANES }}u;
% set each = range(D // 4 // LANES)

// Rows first .. end - 1 of a sequence's, and keys first_key .. end_key - 1 that they see some of.
struct Rows { sequence: u32, token: u32, first: u32, end: u32, cached: i32, first_key: u32, end_key: u32 }

var<workgroup> found: Rows;
var<workgroup> key_at: array<u32, KEYS>;
var<workgroup> staged: array<vec4<f32>, {{ STAGED }}>; // queries and keys (CHUNK, ROWS + 1), (CHUNK, KEYS + 1); or values
var<workgroup> weights: array<f32, KEYS * ROWS>;
var<workgroup> part_max: array<f32, 4 * ROWS>;
var<workgroup> part_sum: array<f32, 4 * ROWS>;
var<workgroup> row_max: array<f32, ROWS>;
var<workgroup> row_sum: array<f32, ROWS>;
var<workgroup> row_factor: array<f32, ROWS>;

fn cached_vector(at: u32) -> vec4<f32> {
  let words = pages[at];
  % if KV_DTYPE == "float32"
  return words;
  % elif KV_DTYPE == "float16"
  return vec4(unpack2x16float(words.x), unpack2x16float(words.y));
  % else
  return bitcast<vec4<f32>>(vec4(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u));
  % endif
}

% if DECODE
  % set row_tiles = (GROUP + ROWS - 1) // ROWS
fn kv_head(group: vec3<u32>) -> u32 { return group.x / {{ row_tiles }}u; }

fn find_rows(group: vec3<u32>, thread: u32) {
  let length = seq_lens[group.z];
  let seen = {{ "max(length - WINDOW, 0)" if WINDOW else "0" }};
  let first_key = seen{{ " + i32(group.y) * numbers.span" if SPLIT }};
  let end_key = {{ "min(first_key + numbers.span, length)" if SPLIT else "length" }};
  let first = group.x % {{ row_tiles }}u * ROWS;
  if (thread == 0u && first_key < end_key) {
    found = Rows(group.z, group.z, first, min(first + ROWS, GROUP), length - 1, u32(first_key), u32(end_key));
  }
}
% else
fn kv_head(group: vec3<u32>) -> u32 { return group.x; }

// Sequence s owns the grid's tiles first_tile(s) .. first_tile(s + 1) - 1: at least as many as its rows fill, and known
// without a sum over the sequences before it.
fn first_tile(s: u32) -> u32 { return u32(query_start[s]) * GROUP / ROWS + s; }

fn find_rows(group: vec3<u32>, thread: u32) {
  let tile = group.y;
  for (var s = thread; s < u32(numbers.seqs); s += {{ THREADS }}u) {
    if (first_tile(s) > tile || tile >= first_tile(s + 1u)) { continue; }
    let token = u32(query_start[s]);
    let count = u32(query_start[s + 1u]) - token;
    let first = (tile - first_tile(s)) * ROWS;
    let end = min(first + ROWS, count * GROUP);
    if (first >= end) { continue; }
    let cached = seq_lens[s] - i32(count);
    let first_key = {{ "max(cached + i32(first / GROUP) - WINDOW + 1, 0)" if WINDOW else "0" }};
    found = Rows(s, token, first, end, cached, u32(first_key), u32(cached) + (end - 1u) / GROUP + 1u);
  }
}
% endif

// Rows past the last stand for it: what they compute is dropped.
fn row_at(rows: Rows, row: u32) -> u32 { return min(rows.first + row, rows.end - 1u); }

fn output_head(rows: Rows, kv: u32, row: u32) -> u32 {
  return ((rows.token + row / GROUP) * KV + kv) * GROUP + row % GROUP;
}

fn find_keys(rows: Rows, kv: u32, first_key: u32, thread: u32) {
  if (thread >= KEYS) { return; }
  let key = min(first_key + thread, rows.end_key - 1u);
  let page = u32(block_table[rows.sequence * u32(numbers.blocks) + key / PAGE]);
  key_at[thread] = ((page * 2u * KV + kv) * PAGE + key % PAGE) * VECTORS;
}

// Rows are one vector longer than they hold, so that those that write columns of them meet different banks.
fn load_queries_and_keys(rows: Rows, kv: u32, chunk: u32, thread: u32) {
  for (var i = thread; i < ROWS * CHUNK; i += {{ THREADS }}u) {
    let head = output_head(rows, kv, row_at(rows, i / CHUNK));
    staged[i % CHUNK * (ROWS + 1u) + i / CHUNK] = q[head * VECTORS + chunk + i % CHUNK];
  }
  for (var i = thread; i < KEYS * CHUNK; i += {{ THREADS }}u) {
    let at = CHUNK * (ROWS + 1u) + i % CHUNK * (KEYS + 1u) + i / CHUNK;
    staged[at] = cached_vector(key_at[i / CHUNK] + chunk + i % CHUNK);
  }
}

fn load_values(first: u32, thread: u32) {
  for (var i = thread; i < VALUES * VECTORS; i += {{ THREADS }}u) {
    staged[i] = cached_vector(key_at[first + i / VECTORS] + KV * PAGE * VECTORS + i % VECTORS);
  }
}

fn masked(rows: Rows, row: u32, key: u32, logit: f32) -> f32 {
  let position = rows.cached + i32(row_at(rows, row) / GROUP);
  let is_seen = key < rows.end_key && i32(key) <= position{{ " && i32(key) > position - WINDOW" if WINDOW }};
  return select(MASKED, logit * numbers.scale, is_seen);
}

// `weights` (KEYS, ROWS) = the logits of keys first_key ...
fn multiply_keys(rows: Rows, kv: u32, first_key: u32, thread: u32) {
  let row = thread % (ROWS / 4u) * 4u;
  let key = thread / (ROWS / 4u) * KEYS_EACH;
  let is_active = key < KEYS;
  var logits: array<vec4<f32>, KEYS_EACH>; // each of 4 rows
  for (var chunk = 0u; chunk < VECTORS; chunk += CHUNK) {
    load_queries_and_keys(rows, kv, chunk, thread);
    workgroupBarrier();
    if (is_active) {
      for (var i = 0u; i < CHUNK; i++) {
  % for r in range(4)
        let q{{ r }} = staged[i * (ROWS + 1u) + row + {{ r }}u];
  % endfor
  % for k in range(KEYS_EACH)
        let k{{ k }} = staged[CHUNK * (ROWS + 1u) + i * (KEYS + 1u) + key + {{ k }}u];
        logits[{{ k }}] += vec4(dot(q0, k{{ k }}), dot(q1, k{{ k }}), dot(q2, k{{ k }}), dot(q3, k{{ k }}));
  % endfor
      }
    }
    workgroupBarrier();
  }
  if (is_active) {
  % for k in range(KEYS_EACH)
    % for r in range(4)
    weights[(key + {{ k }}u) * ROWS + row + {{ r }}u] =
      masked(rows, row + {{ r }}u, first_key + key + {{ k }}u, logits[{{ k }}][{{ r }}]);
    % endfor
  % endfor
  }
  workgroupBarrier();
}

// Logits become weights relative to the largest logit so far. 4 invocations share a row.
fn update_softmax(thread: u32) {
  let row = thread % ROWS;
  let first = thread / ROWS * (KEYS / 4u);
  let is_active = thread < 4u * ROWS;
  if (is_active) {
    var largest = MASKED;
    for (var k = 0u; k < KEYS / 4u; k++) { largest = max(largest, weights[(first + k) * ROWS + row]); }
    part_max[thread] = largest;
  }
  workgroupBarrier();
  var largest = MASKED;
  if (is_active) {
    let others = max(max(part_max[row], part_max[ROWS + row]), max(part_max[2u * ROWS + row], part_max[3u * ROWS + row]));
    largest = max(row_max[row], others);
    var sum = 0.0;
    for (var k = 0u; k < KEYS / 4u; k++) {
      let weight = exp(weights[(first + k) * ROWS + row] - largest);
      weights[(first + k) * ROWS + row] = weight;
      sum += weight;
    }
    part_sum[thread] = sum;
  }
  workgroupBarrier();
  if (thread < ROWS) {
    let factor = exp(row_max[row] - largest);
    let sum = part_sum[row] + part_sum[ROWS + row] + part_sum[2u * ROWS + row] + part_sum[3u * ROWS + row];
    row_sum[row] = row_sum[row] * factor + sum;
    row_factor[row] = factor;
    row_max[row] = largest;
  }
}

{{ ENTRY }} {
  // WGSL says that workgroup memory starts as zeros; not every driver keeps to it.
  if (thread == 0u) { found.end = 0u; }
  workgroupBarrier();
  find_rows(group, thread);
  let rows = workgroupUniformLoad(&found);
  if (rows.end == 0u) { return; }
  let kv = kv_head(group);
  if (thread < ROWS) {
    row_max[thread] = MASKED;
    row_sum[thread] = 0.0;
  }
  let lane = thread % LANES;
  let row = thread / LANES * ROWS_EACH;
  let is_active = row < ROWS;
  % for r in range(ROWS_EACH)
    % for v in each
  var sum{{ r }}_{{ v }} = vec4(0.0);
    % endfor
  % endfor
  for (var first_key = rows.first_key; first_key < rows.end_key; first_key += KEYS) {
    find_keys(rows, kv, first_key, thread);
    workgroupBarrier();
    multiply_keys(rows, kv, first_key, thread);
    update_softmax(thread);
    for (var first = 0u; first < KEYS; first += VALUES) {
      load_values(first, thread);
      workgroupBarrier();
      if (is_active) {
        if (first == 0u) {
  % for r in range(ROWS_EACH)
          let factor{{ r }} = row_factor[row + {{ r }}u];
    % for v in each
          sum{{ r }}_{{ v }} *= factor{{ r }};
    % endfor
  % endfor
        }
        for (var k = 0u; k < VALUES; k++) {
  % for r in range(ROWS_EACH)
          let p{{ r }} = weights[(first + k) * ROWS + row + {{ r }}u];
  % endfor
  % for v in each
          let v{{ v }} = staged[k * VECTORS + {{ v * LANES }}u + lane];
    % for r in range(ROWS_EACH)
          sum{{ r }}_{{ v }} += p{{ r }} * v{{ v }};
    % endfor
  % endfor
        }
      }
      workgroupBarrier();
    }
  }
  if (!is_active) { return; }
  % for r in range(ROWS_EACH)
  if (rows.first + row + {{ r }}u < rows.end) {
    let head = output_head(rows, kv, rows.first + row + {{ r }}u);
    % if SPLIT
    let to = (head * u32(numbers.splits) + group.y) * (VECTORS + 1u);
      % for v in each
    partials[to + {{ v * LANES }}u + lane] = sum{{ r }}_{{ v }};
      % endfor
    if (lane == 0u) { partials[to + VECTORS] = vec4(row_max[row + {{ r }}u], row_sum[row + {{ r }}u], 0.0, 0.0); }
    % else
    let factor = 1.0 / row_sum[row + {{ r }}u];
      % for v in each
    out[head * VECTORS + {{ v * LANES }}u + lane] = sum{{ r }}_{{ v }} * factor;
      % endfor
    % endif
  }
  % endfor
}
