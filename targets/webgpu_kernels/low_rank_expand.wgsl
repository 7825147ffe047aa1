// y += h B^T with each token's own B (low_rank.py), h being the sum of its shares. An invocation takes a quad of
// features; ranks are taken RANKS at a time, which workgroup memory has room for. With SwiGLU, of two halves of
// features, out = silu(first) * second for all tokens.
//
// shares (n, SPLITS, PITCH); b (slots, TILES, RANK, 4) quads; y (n, N); out (n, N / 2). Grid: (blocks of 16 tiles of
// each part, with SwiGLU of the first; ceil(n / TOKENS)).
{{ HEAD }}
const SPLITS = {{ SPLITS }}u;
const PITCH = {{ PITCH }}u;
const TILES = {{ TILES }}u;
const RANK = {{ RANK }}u;
const RANKS = {{ RANKS }}u;
const N = {{ N }}u;
% include "low_rank_members.wgsl"
% set each = range(TOKENS)
% set halves = range(2 if GATED else 1)

var<workgroup> h: array<f32, {{ RANKS * TOKENS * halves | length }}>;
% if EPS is not none
var<workgroup> factors: array<f32, TOKENS>;
% endif

// A part's first tile of B, its first column of y, its features and its place in h, and which of its blocks this is.
struct Place { tile: u32, column: u32, features: u32, rank: u32, block: u32 }

fn place_of(block: u32) -> Place {
  % for part in PARTS[1:] | reverse
  if (block >= {{ part.block }}u) {
    return Place({{ part.tile }}u, {{ part.column }}u, {{ part.features }}u, {{ part.rank }}u, block - {{ part.block }}u);
  }
  % endfor
  return Place(0u, 0u, {{ PARTS[0].features }}u, 0u, block);
}

fn share_sum(token: u32, at: u32) -> f32 {
  var total = 0.0;
  for (var s = 0u; s < SPLITS; s++) { total += shares[(token * SPLITS + s) * PITCH + at]; }
  return total;
}

{{ ENTRY }} {
  let first = group.y * TOKENS;
  let place = place_of(group.x);
  let feature = place.block * {{ THREADS * 4 }}u + thread * 4u;
  let tile = place.tile + min(feature, place.features - 1u) / 16u;
  % for t in each
  let token{{ t }} = min(first + {{ t }}u, u32(numbers.n) - 1u);
  % endfor
  for (var token = first; token < min(first + TOKENS, u32(numbers.n)); token++) {
    if (thread == 0u) { members = members_of(token); }
    let its = workgroupUniformLoad(&members);
    if (its.bits == 0u{{ " || its.slot < 0" if not GATED }}) { continue; }
  % for t in each
    % for half in halves
    var sum{{ t }}{{ half }} = vec4<f32>(0.0);
    % endfor
  % endfor
    if (its.slot >= 0) {
      let quad0 = (u32(its.slot) * TILES + tile) * RANK * 4u + thread % 4u;
  % if GATED
      let quad1 = quad0 + {{ TILES // 2 }}u * RANK * 4u;
  % endif
  % if EPS is not none
    % for t in each
      if (thread == {{ t }}u) {
        factors[{{ t }}] = inverseSqrt(share_sum(token{{ t }}, PITCH - 4u) / {{ K }}.0 + {{ EPS }});
      }
    % endfor
  % endif
      for (var start = 0u; start < RANK; start += RANKS) {
        for (var i = thread; i < {{ halves | length }}u * RANKS * TOKENS; i += {{ THREADS }}u) {
          let rank = start + i / TOKENS % RANKS;
          let row = i / TOKENS / RANKS * RANK + place.rank + min(rank, RANK - 1u);
          h[i] = f32(rank < RANK) * share_sum(min(first + i % TOKENS, u32(numbers.n) - 1u), row);
        }
        workgroupBarrier();
        for (var r = 0u; r < RANKS; r += 4u) {
  % for half in halves
          {
    % for u in range(4)
            let b{{ u }} = rows_of(b[quad{{ half }} + min(start + r + {{ u }}u, RANK - 1u) * 4u]);
    % endfor
    % for t in each
      % for u in range(4)
            sum{{ t }}{{ half }} += b{{ u }} * h[({{ half }}u * RANKS + r + {{ u }}u) * TOKENS + {{ t }}u];
      % endfor
    % endfor
          }
  % endfor
        }
        workgroupBarrier();
      }
  % if EPS is not none
    % for t in each
      % for half in halves
      sum{{ t }}{{ half }} *= factors[{{ t }}];
      % endfor
    % endfor
  % endif
    }
  % for t in each
    if ((its.bits & {{ 2 ** t }}u) != 0u) {
      for (var i = 0u; i < 4u && feature + i < place.features; i++) {
        let at = token{{ t }} * N + place.column + feature + i;
    % if GATED
        let gate = y[at] + sum{{ t }}0[i];
        let up = y[at + N / 2u] + sum{{ t }}1[i];
        out[token{{ t }} * (N / 2u) + feature + i] = gate / (1.0 + exp(min(-gate, 80.0))) * up;
    % else
        y[at] += sum{{ t }}0[i];
    % endif
      }
    }
  % endfor
  }
}
