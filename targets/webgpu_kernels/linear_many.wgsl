// Products of many tokens. A workgroup makes 64 rows (with GATED 32 of the gate and 32 of the up projection) for TILE
// tokens, an invocation 8 rows for 4 of them: quads `rows` and `rows + 8` of 16, which GATED makes gate and up of the
// same outputs. Both operands go through workgroup memory, 32 columns at a time, weights decoded to floats.
//
// x (n, K / 4) vec4; out (n, OUT). Grid: (ceil(N / 64), ceil(n / TILE)).
% include "weights.wgsl"

const OUT = {{ OUT }}u;
const LAST_QUAD = {{ LAST_QUAD }}u;
const TILE = {{ TILE }}u;
const COLUMNS = 32u; // at a time

var<workgroup> w_tile: array<vec4<f32>, COLUMNS * 16>; // (COLUMNS, 16 quads)
var<workgroup> x_tile: array<vec4<f32>, COLUMNS / 4 * TILE>; // (COLUMNS / 4, TILE)

fn quad_at(group: u32, local: u32) -> u32 {
  % if GATED
  return min(group * 8u + local % 8u + local / 8u * (OUT / 4u), LAST_QUAD);
  % else
  return min(group * 16u + local, LAST_QUAD);
  % endif
}

fn load_weights(group: u32, thread: u32, first: u32) {
  for (var i = thread; i < 16u * COLUMNS / UNIT; i += {{ THREADS }}u) {
    let local = i % 16u;
    let column = i / 16u * UNIT;
    var unit = Unit();
    {{ "if (first + column < K) " if K % 32 }}{ unit = weights_of(quad_at(group, local), (first + column) / UNIT); }
    % for j in range(UNIT)
    w_tile[(column + {{ j }}u) * 16u + local] = unit[{{ j }}];
    % endfor
  }
}

fn load_tokens(group: u32, thread: u32, first: u32) {
  for (var i = thread; i < COLUMNS / 4u * TILE; i += {{ THREADS }}u) {
    let column = i % 8u;
    let token = min(group * TILE + i / 8u, u32(numbers.n) - 1u);
    var value = vec4(0.0);
    {{ "if (first + column * 4u < K) " if K % 32 }}{ value = x[token * (K / 4u) + first / 4u + column]; }
    x_tile[column * TILE + i / 8u] = value;
  }
}

{{ ENTRY }} {
  let rows = thread % 8u;
  let tokens = thread / 8u; // and every TILE / 4-th
  % for t in range(4)
  var sum{{ t }}0 = vec4(0.0);
  var sum{{ t }}1 = vec4(0.0);
  % endfor
  for (var first = 0u; first < K; first += COLUMNS) {
    load_weights(group.x, thread, first);
    load_tokens(group.y, thread, first);
    workgroupBarrier();
    for (var k = 0u; k < COLUMNS / 4u; k++) {
      % for t in range(4)
      let x{{ t }} = x_tile[k * TILE + {{ t * TILE // 4 }}u + tokens];
      % endfor
      % for j in range(4)
      {
        let w0 = w_tile[(k * 4u + {{ j }}u) * 16u + rows];
        let w1 = w_tile[(k * 4u + {{ j }}u) * 16u + 8u + rows];
        % for t in range(4)
        sum{{ t }}0 += w0 * x{{ t }}[{{ j }}];
        sum{{ t }}1 += w1 * x{{ t }}[{{ j }}];
        % endfor
      }
      % endfor
    }
    workgroupBarrier();
  }
  % for t in range(4)
    % set token = "group.y * TILE + %du + tokens" % (t * TILE // 4)
    % if GATED
  store({{ token }}, (group.x * 8u + rows) * 4u, sum{{ t }}0, sum{{ t }}1);
    % else
  store({{ token }}, (group.x * 16u + rows) * 4u, sum{{ t }}0, sum{{ t }}0);
  store({{ token }}, (group.x * 16u + 8u + rows) * 4u, sum{{ t }}1, sum{{ t }}1);
    % endif
  % endfor
}
% include "store.wgsl"
