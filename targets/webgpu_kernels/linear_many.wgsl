// Products of many tokens. A workgroup makes 4 * QUADS rows (with GATED half of them of the gate, half of the up
// projection) for TILE tokens, an invocation 8 rows for TOKENS_EACH of them: quads `rows` and `rows + QUADS / 2`, which
// GATED makes gate and up of the same outputs. Both operands go through workgroup memory, COLUMNS at a time, weights
// decoded.
//
// HALF: operands and the sums over COLUMNS columns in half precision, sums of these in single.
//
// x (n, K / 4) vec4; out (n, OUT). Grid: (ceil(N / (4 * QUADS)), ceil(n / TILE)).
% set F = "f16" if HALF else "f32"
% if HALF
enable f16;
% endif
{{ HEAD }}
% include "weights.wgsl"

const OUT = {{ OUT }}u;
const TILE = {{ TILE }}u;
const QUADS = {{ QUADS }}u;
const COLUMNS = {{ COLUMNS }}u;
% set is_even = K % COLUMNS == 0

var<workgroup> w_tile: array<vec4<{{ F }}>, COLUMNS * QUADS>; // (COLUMNS, QUADS)
var<workgroup> x_tile: array<vec4<{{ F }}>, COLUMNS / 4u * TILE>; // (COLUMNS / 4, TILE), see `place`

fn quad_at(group: u32, local: u32) -> u32 {
  % if GATED
  return min(group * (QUADS / 2u) + local % (QUADS / 2u) + local / (QUADS / 2u) * (OUT / 4u), {{ LAST_QUAD }});
  % else
  return min(group * QUADS + local, {{ LAST_QUAD }});
  % endif
}

fn load_weights(group: u32, thread: u32, first: u32) {
  for (var i = thread; i < QUADS * COLUMNS / UNIT; i += {{ THREADS }}u) {
    let local = i % QUADS;
    let column = i / QUADS * UNIT;
    % set at = "(first + column) / UNIT"
    // Past the last column are the last ones again; their tokens' values are zero.
    let unit = weights_of(quad_at(group, local), {{ "min(%s, UNITS - 1u)" % at if not is_even else at }});
    % for j in range(UNIT)
    w_tile[(column + {{ j }}u) * QUADS + local] = vec4<{{ F }}>(unit[{{ j }}]);
    % endfor
  }
}

// Where a token's columns are in x_tile: invocations that write several columns of a token meet different banks.
fn place(column: u32, token: u32) -> u32 { return column * TILE + (token ^ (column * {{ 4 if HALF else 1 }}u)); }

fn load_tokens(group: u32, thread: u32, first: u32) {
  for (var i = thread; i < COLUMNS / 4u * TILE; i += {{ THREADS }}u) {
    let column = i % (COLUMNS / 4u);
    let token = min(group * TILE + i / (COLUMNS / 4u), u32(numbers.n) - 1u);
    var value = vec4<f32>(0.0);
    {{ "if (first + column * 4u < K) " if not is_even }}{ value = x[token * (K / 4u) + first / 4u + column]; }
    x_tile[place(column, i / (COLUMNS / 4u))] = vec4<{{ F }}>(value);
  }
}

{{ ENTRY }} {
  let rows = thread % (QUADS / 2u);
  let tokens = thread / (QUADS / 2u); // and every TILE / TOKENS_EACH-th
  % for t in range(TOKENS_EACH)
  var sum{{ t }}0 = vec4<f32>(0.0);
  var sum{{ t }}1 = vec4<f32>(0.0);
  % endfor
  for (var first = 0u; first < K; first += COLUMNS) {
    load_weights(group.x, thread, first);
    load_tokens(group.y, thread, first);
    workgroupBarrier();
  % set sum = "part" if HALF else "sum"
  % if HALF
    % for t in range(TOKENS_EACH)
    var part{{ t }}0 = vec4<f16>(0.0h);
    var part{{ t }}1 = vec4<f16>(0.0h);
    % endfor
  % endif
  // Unrolled, so that places in workgroup memory are one of few sums and a constant.
  % set step = TILE // TOKENS_EACH
  % for k in range(COLUMNS // 4)
    {
    % set turn = k * (4 if HALF else 1)
      let at = {{ k * TILE }}u + (tokens ^ {{ turn % step }}u);
    % for t in range(TOKENS_EACH)
      let x{{ t }} = x_tile[at + {{ (t * step).__xor__(turn - turn % step) }}u]; // place(k, t * step + tokens)
    % endfor
    % for j in range(4)
      {
        let w0 = w_tile[{{ (k * 4 + j) * QUADS }}u + rows];
        let w1 = w_tile[{{ (k * 4 + j) * QUADS + QUADS // 2 }}u + rows];
      % for t in range(TOKENS_EACH)
        {{ sum }}{{ t }}0 += w0 * x{{ t }}[{{ j }}];
        {{ sum }}{{ t }}1 += w1 * x{{ t }}[{{ j }}];
      % endfor
      }
    % endfor
    }
  % endfor
  % if HALF
    % for t in range(TOKENS_EACH)
    sum{{ t }}0 += vec4<f32>(part{{ t }}0);
    sum{{ t }}1 += vec4<f32>(part{{ t }}1);
    % endfor
  % endif
    workgroupBarrier();
  }
  % for t in range(TOKENS_EACH)
    % set token = "group.y * TILE + %du + tokens" % (t * TILE // TOKENS_EACH)
    % if GATED
  store({{ token }}, (group.x * (QUADS / 2u) + rows) * 4u, sum{{ t }}0, sum{{ t }}1);
    % else
  store({{ token }}, (group.x * QUADS + rows) * 4u, sum{{ t }}0, sum{{ t }}0);
  store({{ token }}, (group.x * QUADS + QUADS / 2u + rows) * 4u, sum{{ t }}1, sum{{ t }}1);
    % endif
  % endfor
}
% include "store.wgsl"
