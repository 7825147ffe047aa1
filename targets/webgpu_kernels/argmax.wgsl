// out (rows) = index of the largest of logits (rows, COLUMNS), the first of equal ones. Grid: (rows).
{{ HEAD }}
const COLUMNS = {{ COLUMNS }}u;

var<workgroup> values: array<f32, {{ THREADS }}>;
var<workgroup> places: array<u32, {{ THREADS }}>;

{{ ENTRY }} {
  let first = group.x * COLUMNS;
  var place = min(thread, COLUMNS - 1u);
  var value = logits[first + place];
  for (var i = thread + {{ THREADS }}u; i < COLUMNS; i += {{ THREADS }}u) {
    if (logits[first + i] > value) {
      value = logits[first + i];
      place = i;
    }
  }
  values[thread] = value;
  places[thread] = place;
  workgroupBarrier();
  for (var count = {{ THREADS // 2 }}u; count > 0u; count /= 2u) {
    if (thread < count) {
      let other = values[thread + count];
      let is_first = other == values[thread] && places[thread + count] < places[thread];
      if (other > values[thread] || is_first) {
        values[thread] = other;
        places[thread] = places[thread + count];
      }
    }
    workgroupBarrier();
  }
  if (thread == 0u) { out[group.x] = i32(places[0]); }
}
