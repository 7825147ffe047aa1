// Causal attention over paged caches. Rows are (token, head of the group) pairs, so that all heads of a group share
// what is read of the cache. A workgroup takes ROWS rows of one sequence and one key/value head and goes through the
// keys that they see, KEYS at a time: logits, an online softmax, the weighted sum of values.
//
// q, out (n, H, D / 4) vec4; pages (num_pages, 2, KV, PAGE, D / 4) vec4; block_table (seqs, blocks); seq_lens (seqs);
// query_start (seqs + 1); for steps with token trees tree_masks, and for their windows positions (n). Grid: (KV, row
// tiles of all sequences).
{{ HEAD }}
const KV = {{ KV }}u;
const GROUP = {{ GROUP }}u; // query heads of a key/value head
const VECTORS = {{ D // 4 }}u; // of a head
const PAGE = {{ PAGE }}u;
const WINDOW = {{ WINDOW }};
const ROWS = {{ ROWS }}u;
const KEYS = 32u;
const CHUNK = {{ CHUNK }}u; // vectors of queries and keys at a time
const VALUES = {{ VALUES }}u; // keys whose values are there at a time
const MASKED = -1e30;
// Of a tile of logits, an invocation makes every ROWS / 4-th row by KEYS_EACH; of the output, 4 rows by every LANES-th
// vector. SHARERS invocations share a row's softmax.
const KEYS_EACH = {{ ROWS // 16 }}u;
const LANES = {{ THREADS * 4 // ROWS }}u;
const SHARERS = {{ THREADS // ROWS }}u;
{% set KEYS_EACH, LANES, SHARERS = ROWS // 16, THREADS * 4 // ROWS, THREADS // ROWS %}
% set each = range(D // 4 // LANES)

// Rows first .. end - 1 of a sequence's, and keys first_key .. end_key - 1 that they see some of.
struct Rows { sequence: u32, token: u32, first: u32, end: u32, cached: i32, first_key: u32, end_key: u32 }

var<workgroup> found: Rows;
var<workgroup> key_at: array<u32, KEYS>;
var<workgroup> staged: array<vec4<f32>, {{ STAGED }}>; // queries and keys (CHUNK, ROWS + 1), (CHUNK, KEYS + 1); or values
var<workgroup> weights: array<f32, KEYS * ROWS>;
var<workgroup> part_max: array<f32, SHARERS * ROWS>; // and then what each row's sums are scaled by
var<workgroup> part_sum: array<f32, SHARERS * ROWS>;
var<workgroup> row_max: array<f32, ROWS>;
var<workgroup> row_sum: array<f32, ROWS>;

% include "attention_cache.wgsl"

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
  % if TREES
    // Rows of a tree may see all new tokens, and none of their positions is before those.
    let may_be_tree = count <= 32u;
    let before = i32(select(first / GROUP, 0u, may_be_tree));
    let until = select((end - 1u) / GROUP + 1u, count, may_be_tree);
  % else
    let before = i32(first / GROUP);
    let until = (end - 1u) / GROUP + 1u;
  % endif
    let first_key = {{ "max(cached + before - WINDOW + 1, 0)" if WINDOW else "0" }};
    found = Rows(s, token, first, end, cached, u32(first_key), u32(cached) + until);
  }
}

// Rows past the last stand for it: what they compute is dropped.
fn row_at(rows: Rows, row: u32) -> u32 { return min(rows.first + row, rows.end - 1u); }

fn output_head(rows: Rows, kv: u32, row: u32) -> u32 {
  return ((rows.token + row / GROUP) * KV + kv) * GROUP + row % GROUP;
}

fn find_keys(rows: Rows, kv: u32, first_key: u32, thread: u32) {
  if (thread >= KEYS) { return; }
  let key = min(first_key + thread, rows.end_key - 1u);
  key_at[thread] = vector_at(rows.sequence, kv, key);
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

fn sees(rows: Rows, row: u32, key: u32) -> bool {
  let token = row_at(rows, row) / GROUP;
  let position = rows.cached + i32(token);
  % if TREES
  let mask = u32(tree_masks[rows.token + token]);
  let own = i32(key) - rows.cached; // among the sequence's new tokens
  if (mask != 0u && own >= 0) { return own < 32 && (mask >> u32(own) & 1u) != 0u; }
    % if WINDOW
  if (mask != 0u) { return i32(key) > positions[rows.token + token] - WINDOW; }
    % endif
  % endif
  return key < rows.end_key && i32(key) <= position{{ " && i32(key) > position - WINDOW" if WINDOW }};
}

fn masked(rows: Rows, row: u32, key: u32, logit: f32) -> f32 {
  return select(MASKED, logit * numbers.scale, sees(rows, row, key));
}

// `weights` (KEYS, ROWS) = the logits of keys first_key ...
fn multiply_keys(rows: Rows, kv: u32, first_key: u32, thread: u32) {
  let row = thread % (ROWS / 4u);
  let key = thread / (ROWS / 4u) * KEYS_EACH;
  % for k in range(KEYS_EACH)
  var logits{{ k }} = vec4<f32>(0.0); // each of 4 rows
  % endfor
  for (var chunk = 0u; chunk < VECTORS; chunk += CHUNK) {
    load_queries_and_keys(rows, kv, chunk, thread);
    workgroupBarrier();
    for (var i = 0u; i < CHUNK; i++) {
  % for r in range(4)
      let q{{ r }} = staged[i * (ROWS + 1u) + row + {{ r * ROWS // 4 }}u];
  % endfor
  % for k in range(KEYS_EACH)
      let k{{ k }} = staged[CHUNK * (ROWS + 1u) + i * (KEYS + 1u) + key + {{ k }}u];
      logits{{ k }} += vec4<f32>(dot(q0, k{{ k }}), dot(q1, k{{ k }}), dot(q2, k{{ k }}), dot(q3, k{{ k }}));
  % endfor
    }
    workgroupBarrier();
  }
  % for k in range(KEYS_EACH)
    % for r in range(4)
  weights[(key + {{ k }}u) * ROWS + row + {{ r * ROWS // 4 }}u] =
    masked(rows, row + {{ r * ROWS // 4 }}u, first_key + key + {{ k }}u, logits{{ k }}[{{ r }}]);
    % endfor
  % endfor
  workgroupBarrier();
}

// Logits become weights relative to the largest logit so far.
fn update_softmax(thread: u32) {
  let row = thread % ROWS;
  let first = thread / ROWS * (KEYS / SHARERS);
  var largest = MASKED;
  for (var k = 0u; k < KEYS / SHARERS; k++) { largest = max(largest, weights[(first + k) * ROWS + row]); }
  part_max[thread] = largest;
  workgroupBarrier();
  largest = row_max[row];
  % for i in range(SHARERS)
  largest = max(largest, part_max[{{ i * ROWS }}u + row]);
  % endfor
  var sum = 0.0;
  for (var k = 0u; k < KEYS / SHARERS; k++) {
    let weight = exp(weights[(first + k) * ROWS + row] - largest);
    weights[(first + k) * ROWS + row] = weight;
    sum += weight;
  }
  part_sum[thread] = sum;
  workgroupBarrier();
  if (thread < ROWS) {
    let factor = exp(row_max[row] - largest);
    sum = {% for i in range(SHARERS) %}{{ " + " if i }}part_sum[{{ i * ROWS }}u + row]{% endfor %};
    row_sum[row] = row_sum[row] * factor + sum;
    part_max[row] = factor;
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
  let kv = group.x;
  if (thread < ROWS) {
    row_max[thread] = MASKED;
    row_sum[thread] = 0.0;
  }
  let lane = thread % LANES;
  let row = thread / LANES * 4u;
  % for r in range(4)
    % for v in each
  var sum{{ r }}_{{ v }} = vec4<f32>(0.0);
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
      if (first == 0u) {
  % for r in range(4)
        let factor{{ r }} = part_max[row + {{ r }}u];
    % for v in each
        sum{{ r }}_{{ v }} *= factor{{ r }};
    % endfor
  % endfor
      }
      for (var k = 0u; k < VALUES; k++) {
  % for r in range(4)
        let p{{ r }} = weights[(first + k) * ROWS + row + {{ r }}u];
  % endfor
  % for v in each
        let v{{ v }} = staged[k * VECTORS + {{ v * LANES }}u + lane];
    % for r in range(4)
        sum{{ r }}_{{ v }} += p{{ r }} * v{{ v }};
    % endfor
  % endfor
      }
      workgroupBarrier();
    }
  }
  % for r in range(4)
  if (rows.first + row + {{ r }}u < rows.end) {
    let head = output_head(rows, kv, rows.first + row + {{ r }}u);
    let factor = 1.0 / row_sum[row + {{ r }}u];
      % for v in each
    out[head * VECTORS + {{ v * LANES }}u + lane] = sum{{ r }}_{{ v }} * factor;
      % endfor
  }
  % endfor
}
