// out (n, K / 4) vec4 = rows `ids` of the table, with SPLIT of rows numbers.first_row .. numbers.end_row - 1 only. Grid: (ceil(UNITS / THREADS), n).
{{ HEAD }}
% include "weights.wgsl"

{{ ENTRY }} {
  let unit = group.x * {{ THREADS }}u + thread;
  if (unit >= UNITS) { return; }
  % if SPLIT
  if (ids[group.y] < numbers.first_row || ids[group.y] >= numbers.end_row) { return; }
  let id = u32(ids[group.y] - numbers.first_row);
  % else
  let id = u32(ids[group.y]);
  % endif
  let row = id % 4u;
  let values = weights_of(id / 4u, unit);
  let at = group.y * (K / 4u) + unit * (UNIT / 4u);
  % for p in range(UNIT // 4)
    % set j = p * 4
  out[at + {{ p }}u] = vec4(values[{{ j }}][row], values[{{ j + 1 }}][row], values[{{ j + 2 }}][row], values[{{ j + 3 }}][row]);
  % endfor
}
