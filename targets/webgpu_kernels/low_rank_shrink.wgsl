// h = f(x) A^T with each token's own A (low_rank.py): of a share of A's columns, 16 rows. An invocation takes a quad of
// rows and every LANES-th vector of columns; the sums meet in workgroup memory. With a norm h lacks the factor
// 1 / rms(x), whose sum of squares stands behind it.
//
// x (n, K / 4) vec4; norm (K / 4) vec4; a (slots, TILES, K, 4) quads; shares (n, SPLITS, TILES * 4 + 1) vec4.
// Grid: (TILES * SPLITS, ceil(n / TOKENS)).
{{ HEAD }}
const LENGTH = {{ K // 4 }}u;
const TILES = {{ TILES }}u;
const SPLITS = {{ SPLITS }}u;
const SHARE = {{ SHARE }}u; // vectors of columns
const LANES = {{ THREADS // 4 }}u;
% include "low_rank_members.wgsl"
% set each = range(TOKENS)

var<workgroup> sums: array<vec4<f32>, {{ THREADS * 3 // 4 * TOKENS }}>;
% if HAS_NORM
var<workgroup> square_sums: array<f32, {{ THREADS * 3 // 4 * TOKENS }}>;
% endif

{{ ENTRY }} {
  let first = group.y * TOKENS;
  let tile = group.x % TILES;
  let split = group.x / TILES;
  let end = min((split + 1u) * SHARE, LENGTH);
  for (var token = first; token < min(first + TOKENS, u32(numbers.n)); token++) {
    if (thread == 0u) { members = members_of(token); }
    let its = workgroupUniformLoad(&members);
    if (its.bits == 0u || its.slot < 0) { continue; }
    let quad = ((u32(its.slot) * TILES + tile) * LENGTH * 4u) * 4u + thread % 4u;
  % for t in each
    let token{{ t }} = min(first + {{ t }}u, u32(numbers.n) - 1u);
    var sum{{ t }} = vec4<f32>(0.0);
    var square{{ t }} = 0.0;
  % endfor
    for (var at = split * SHARE + thread / 4u; at < end; at += LANES) {
  % for j in range(4)
      let a{{ j }} = rows_of(a[quad + (at * 4u + {{ j }}u) * 4u]);
  % endfor
  % if HAS_NORM
      let norm_at = norm[at];
  % endif
  % for t in each
      {
        let values = x[token{{ t }} * LENGTH + at];
    % if HAS_NORM
        square{{ t }} += dot(values, values);
        let v = values * norm_at;
    % else
        let v = values;
    % endif
        sum{{ t }} += a0 * v.x + a1 * v.y + a2 * v.z + a3 * v.w;
      }
  % endfor
    }

    // Three quarters of the invocations hand their sums to the first, until there is one for each quad.
    for (var count = {{ THREADS // 4 }}u; count >= 4u; count /= 4u) {
      if (thread >= count && thread < 4u * count) {
  % for t in each
        sums[{{ t * (THREADS * 3 // 4) }}u + thread - count] = sum{{ t }};
    % if HAS_NORM
        square_sums[{{ t * (THREADS * 3 // 4) }}u + thread - count] = square{{ t }};
    % endif
  % endfor
      }
      workgroupBarrier();
      if (thread < count) {
        for (var i = thread; i < 3u * count; i += count) {
  % for t in each
          sum{{ t }} += sums[{{ t * (THREADS * 3 // 4) }}u + i];
    % if HAS_NORM
          square{{ t }} += square_sums[{{ t * (THREADS * 3 // 4) }}u + i];
    % endif
  % endfor
        }
      }
      workgroupBarrier();
    }
    if (thread >= 4u) { continue; }
  % for t in each
    if ((its.bits & {{ 2 ** t }}u) != 0u) {
      let share = (token{{ t }} * SPLITS + split) * (TILES * 4u + 1u);
      shares[share + tile * 4u + thread] = sum{{ t }};
    % if HAS_NORM
      if (tile == 0u && thread == 0u) { shares[share + TILES * 4u] = vec4<f32>(square{{ t }}); }
    % endif
    }
  % endfor
  }
}
