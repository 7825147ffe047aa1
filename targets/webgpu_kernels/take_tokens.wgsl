// Tokens that the step before chose into this one's inputs: where rows (n,) is not -1, chosen of it. Grid: n / THREADS.
{{ HEAD }}
{{ ENTRY }} {
  let i = group.x * {{ THREADS }}u + thread;
  if (i < u32(numbers.n)) {
    let row = rows[i];
    if (row >= 0) { input_ids[i] = chosen[row]; }
  }
}
