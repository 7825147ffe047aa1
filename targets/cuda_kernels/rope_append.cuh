// Rotary embedding (Su et al. 2021, pairs (i, i + D / 2)) of queries and keys, and keys and values into the cache.
#pragma once
#include "primitives.cuh"

// Columns i and i + D / 2 of a head, turned by their angle.
DEVICE void turn(float& a, float& b, float cos, float sin) {
  float turned = a * cos - b * sin;
  b = b * cos + a * sin;
  a = turned;
}

// qkv (n, H + 2 KV, D); cos, sin (n, D / 2); slots (n,), negative: nothing is stored; pages (num_pages, 2, KV, PAGE, D);
// q (n, H, D). Grid: (n, ceil((H + 2 KV) * D / 2 / blockDim)).
template <class T, class Page, class Q, int H, int KV, int D, int PAGE>
DEVICE void rope_append(const T* qkv, const float* cos, const float* sin, const i32* slots, Page* pages, Q* q) {
  wait_for_previous();
  let_next_start();
  int token = blockIdx.x, at = blockIdx.y * blockDim.x + threadIdx.x, head = at / (D / 2), i = at % (D / 2);
  if (head >= H + 2 * KV) return;
  const T* x = qkv + (i64(token) * (H + 2 * KV) + head) * D + i;
  float a = to_float(x[0]), b = to_float(x[D / 2]);
  if (head < H + KV) turn(a, b, cos[token * (D / 2) + i], sin[token * (D / 2) + i]);
  if (head < H) {
    Q* out = q + (i64(token) * H + head) * D + i;
    out[0] = from_float<Q>(a);
    out[D / 2] = from_float<Q>(b);
    return;
  }
  int slot = slots[token], kv = (head - H) % KV, is_value = (head - H) / KV;
  if (slot < 0) return;
  Page* out = pages + (((i64(slot / PAGE) * 2 + is_value) * KV + kv) * PAGE + slot % PAGE) * D + i;
  out[0] = from_float<Page>(a);
  out[D / 2] = from_float<Page>(b);
}
