// Products of a few tokens, bound by reading the weights. A workgroup makes 16 rows (with GATED also the 16 of the up
// projection) for TOKENS tokens: an invocation takes units of one quad, every LANES-th, so that invocations side by
// side read words side by side; the sums meet in workgroup memory.
//
// The norm's factor 1 / rms(x) is that of a whole product, so it comes at the end: squares are summed beside.
//
// x (n, K / 4) vec4; norm (K / 4) vec4; out (n, OUT). Grid: (ceil(OUT / 16), ceil(n / TOKENS)).
{{ HEAD }}
% include "weights.wgsl"

const LANES = {{ THREADS // 4 }}u;
const OUT = {{ OUT }}u;
% set parts = range(UNIT // 4)
% set halves = range(2 if GATED else 1)

% set steps = K // UNIT // (UNROLL * (THREADS // 4))
% set is_even = steps * UNROLL * (THREADS // 4) * UNIT == K

var<workgroup> sums: array<vec4<f32>, {{ THREADS * 3 // 4 * TOKENS * halves | length }}>;
% if EPS is not none
var<workgroup> square_sums: array<vec4<f32>, {{ THREADS * 3 // 4 }}>;
% endif

{{ ENTRY }} {
  let quad0 = min(group.x * 4u + thread % 4u, {{ LAST_QUAD }});
  % if GATED
  let quad1 = min(quad0 + OUT / 4u, {{ LAST_QUAD }});
  % endif
  let lane = thread / 4u;
  % for t in range(TOKENS)
  let token{{ t }} = {{ "0u" if TOKENS == 1 else "min(group.y * %du + %du, u32(numbers.n) - 1u)" % (TOKENS, t) }};
    % for h in halves
  var sum{{ t }}{{ h }} = vec4<f32>(0.0);
    % endfor
  % endfor
  % if EPS is not none
  var squares = vec4<f32>(0.0); // of each token
  % endif

  // What is stored is asked for before any of it is used.
  for (var first = lane; first < UNITS; first += {{ UNROLL }}u * LANES) {
  % for u in range(UNROLL)
    let unit{{ u }} = {{ "first + %du * LANES" % u if is_even else "min(first + %du * LANES, UNITS - 1u)" % u }};
    % for h in halves
    let words{{ u }}{{ h }} = words_of(quad{{ h }}, unit{{ u }});
      % if fmt.is_grouped
    let s{{ u }}{{ h }} = scale_of(quad{{ h }}, unit{{ u }});
      % endif
    % endfor
  % endfor
  % for u in range(UNROLL)
    {
    % for h in halves
      let w{{ h }} = unit_of(words{{ u }}{{ h }});
    % endfor
    % for p in parts
      let at{{ p }} = unit{{ u }} * {{ UNIT // 4 }}u + {{ p }}u;
      % if not is_even
      let is_there{{ p }} = f32(first + {{ u }}u * LANES < UNITS);
      % endif
      % if EPS is not none
      let norm{{ p }} = norm[at{{ p }}];
      % endif
    % endfor
    % for t in range(TOKENS)
      {
      % for p in parts
        let x{{ p }}_ = x[token{{ t }} * (K / 4u) + at{{ p }}]{{ " * is_there%d" % p if not is_even }};
        % if EPS is not none
        squares[{{ t }}] += dot(x{{ p }}_, x{{ p }}_);
        let x{{ p }} = x{{ p }}_ * norm{{ p }};
        % else
        let x{{ p }} = x{{ p }}_;
        % endif
      % endfor
      % if fmt.is_grouped
        let total = dot({{ "x0 + x1" if UNIT == 8 else "x0" }}, vec4<f32>(1.0));
      % endif
      % for h in halves
        {
          var products = w{{ h }}[0] * x0[0];
        % for j in range(1, UNIT)
          products += w{{ h }}[{{ j }}] * x{{ j // 4 }}[{{ j % 4 }}];
        % endfor
        % if fmt.is_grouped
          products = products * s{{ u }}{{ h }}.scale + total * s{{ u }}{{ h }}.offset;
        % endif
          sum{{ t }}{{ h }} += products;
        }
      % endfor
      }
    % endfor
    }
  % endfor
  }

  // Three quarters of the invocations hand their sums to the first, until there is one for each quad.
  for (var count = {{ THREADS // 4 }}u; count >= 4u; count /= 4u) {
    if (thread >= count && thread < 4u * count) {
  % for t in range(TOKENS)
    % for h in halves
      sums[{{ (t * halves | length + h) * (THREADS * 3 // 4) }}u + thread - count] = sum{{ t }}{{ h }};
    % endfor
  % endfor
  % if EPS is not none
      square_sums[thread - count] = squares;
  % endif
    }
    workgroupBarrier();
    if (thread < count) {
      for (var i = thread; i < 3u * count; i += count) {
  % for t in range(TOKENS)
    % for h in halves
        sum{{ t }}{{ h }} += sums[{{ (t * halves | length + h) * (THREADS * 3 // 4) }}u + i];
    % endfor
  % endfor
  % if EPS is not none
        squares += square_sums[i];
  % endif
      }
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
