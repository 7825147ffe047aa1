// Products of a few tokens, bound by reading the weights. A workgroup makes 16 rows (with GATED also the 16 of the up
// projection) for TOKENS tokens: an invocation takes units of one quad, every LANES-th, so that invocations side by
// side read words side by side; the sums meet in workgroup memory.
//
// The norm's factor 1 / rms(x) is that of a whole product, so it comes at the end: squares are summed beside.
//
// x (n, K / 4) vec4; norm (K / 4) vec4; out (n, OUT). Grid: (ceil(OUT / 16), ceil(n / TOKENS)).
% include "weights.wgsl"

const LANES = {{ THREADS // 4 }}u;
const OUT = {{ OUT }}u;
const LAST_QUAD = {{ LAST_QUAD }}u;
% set parts = range(UNIT // 4)
% set halves = range(2 if GATED else 1)

var<workgroup> sums: array<vec4<f32>, {{ THREADS // 2 * TOKENS * halves | length }}>;
% if EPS is not none
var<workgroup> square_sums: array<vec4<f32>, {{ THREADS // 2 }}>;
% endif


{{ ENTRY }} {
  let quad0 = min(group.x * 4u + thread % 4u, LAST_QUAD);
  % if GATED
  let quad1 = min(quad0 + OUT / 4u, LAST_QUAD);
  % endif
  let lane = thread / 4u;
  % for t in range(TOKENS)
  let token{{ t }} = {{ "0u" if TOKENS == 1 else "min(group.y * %du + %du, u32(numbers.n) - 1u)" % (TOKENS, t) }};
    % for h in halves
  var sum{{ t }}{{ h }} = vec4(0.0);
    % endfor
  % endfor
  % if EPS is not none
  var squares = vec4(0.0); // of each token
  % endif

  for (var unit = lane; unit < UNITS; unit += LANES) {
  % for h in halves
    % if fmt.is_grouped
    let w{{ h }} = unit_of(quad{{ h }}, unit);
    let s{{ h }} = scale_of(quad{{ h }}, unit);
    % else
    let w{{ h }} = weights_of(quad{{ h }}, unit);
    % endif
  % endfor
  % for p in parts
    let at{{ p }} = unit * {{ UNIT // 4 }}u + {{ p }}u;
    % if EPS is not none
    let norm{{ p }} = norm[at{{ p }}];
    % endif
  % endfor
  % for t in range(TOKENS)
    {
    % for p in parts
      % if EPS is not none
      let x{{ p }}_ = x[token{{ t }} * (K / 4u) + at{{ p }}];
      squares[{{ t }}] += dot(x{{ p }}_, x{{ p }}_);
      let x{{ p }} = x{{ p }}_ * norm{{ p }};
      % else
      let x{{ p }} = x[token{{ t }} * (K / 4u) + at{{ p }}];
      % endif
    % endfor
    % if fmt.is_grouped
      let total = dot({{ "x0 + x1" if UNIT == 8 else "x0" }}, vec4(1.0));
    % endif
    % for h in halves
      {
        var products = w{{ h }}[0] * x0[0];
      % for j in range(1, UNIT)
        products += w{{ h }}[{{ j }}] * x{{ j // 4 }}[{{ j % 4 }}];
      % endfor
        sum{{ t }}{{ h }} += {{ "products * s%d.scale + total * s%d.offset" % (h, h) if fmt.is_grouped else "products" }};
      }
    % endfor
    }
  % endfor
  }

  // Invocations of the upper half hand their sums to the lower one, until there is one for each quad.
  for (var count = {{ THREADS // 2 }}u; count >= 4u; count /= 2u) {
    if (thread >= count && thread < 2u * count) {
  % for t in range(TOKENS)
    % for h in halves
      sums[{{ (t * halves | length + h) * (THREADS // 2) }}u + thread - count] = sum{{ t }}{{ h }};
    % endfor
  % endfor
  % if EPS is not none
      square_sums[thread - count] = squares;
  % endif
    }
    workgroupBarrier();
    if (thread < count) {
  % for t in range(TOKENS)
    % for h in halves
      sum{{ t }}{{ h }} += sums[{{ (t * halves | length + h) * (THREADS // 2) }}u + thread];
    % endfor
  % endfor
  % if EPS is not none
      squares += square_sums[thread];
  % endif
    }
    workgroupBarrier();
  }
  if (thread >= 4u) { return; }
  % if EPS is not none
  let factors = inverseSqrt(squares / f32(K) + {{ EPS }});
  % endif
  let row = (group.x * 4u + thread) * 4u;
  % for t in range(TOKENS)
    % set factor = "factors[%d] * " % t if EPS is not none else ""
  store({{ "group.y * %du + %du" % (TOKENS, t) }}, row, {{ factor }}sum{{ t }}0, {{ factor }}sum{{ t }}{{ 1 if GATED else 0 }});
  % endfor
}
% include "store.wgsl"
