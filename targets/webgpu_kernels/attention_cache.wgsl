// Keys and values in the pages, by vectors of 4 columns.
fn cached_vector(at: u32) -> vec4<f32> {
  let words = pages[at];
  % if KV_DTYPE == "float32"
  return words;
  % elif KV_DTYPE == "float16"
  return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
  % else
  return bitcast<vec4<f32>>(vec4<u32>(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u));
  % endif
}

// Where a sequence's key begins; its value is KV * PAGE * VECTORS behind.
fn vector_at(sequence: u32, kv: u32, key: u32) -> u32 {
  let page = u32(block_table[sequence * u32(numbers.blocks) + key / PAGE]);
  return ((page * 2u * KV + kv) * PAGE + key % PAGE) * VECTORS;
}
