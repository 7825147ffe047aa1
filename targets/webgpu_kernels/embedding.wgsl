// out (n, K / 4) vec4 = rows `ids` of the table. Grid: (ceil(UNITS / THREADS), n).
{{ HEAD }}
% include "weights.wgsl"

{{ ENTRY }} {
  let unit = group.x * {{ THREADS }}u + thread;
  if (unit >= UNITS) { return; }
  let id = u32(ids[group.y]);
  let row = id % 4u;
  let values = weights_of(id / 4u, unit);
  let at = group.y * (K / 4u) + unit * (UNIT / 4u);
  % for p in range(UNIT // 4)
    % set j = p * 4
  out[at + {{ p }}u] = vec4(values[{{ j }}][row], values[{{ j + 1 }}][row], values[{{ j + 2 }}][row], values[{{ j + 3 }}][row]);
  % endfor
}
