// out (n, K / 4) vec4 = x / rms(x) * norm. Grid: (n).
{{ HEAD }}
const LENGTH = {{ K // 4 }}u;

var<workgroup> squares: array<f32, {{ THREADS }}>;

{{ ENTRY }} {
  let first = group.x * LENGTH;
  var sum = 0.0;
  for (var i = thread; i < LENGTH; i += {{ THREADS }}u) { sum += dot(x[first + i], x[first + i]); }
  squares[thread] = sum;
  workgroupBarrier();
  for (var count = {{ THREADS // 2 }}u; count > 0u; count /= 2u) {
    if (thread < count) { squares[thread] += squares[thread + count]; }
    workgroupBarrier();
  }
  let factor = inverseSqrt(squares[0] / {{ K }}.0 + {{ EPS }});
  for (var i = thread; i < LENGTH; i += {{ THREADS }}u) { out[first + i] = x[first + i] * factor * norm[i]; }
}
