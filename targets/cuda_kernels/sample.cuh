// From logits to tokens.
#pragma once
#include "primitives.cuh"

struct Best {
  float value;
  i32 index;
};

// The larger value, of equal ones the smaller index; a NaN is larger than everything, so that it is noticed.
DEVICE Best better(Best a, Best b) {
  if (isnan(a.value) || isnan(b.value)) return isnan(a.value) ? a : b;
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

template <int THREADS> DEVICE Best block_best(Best best) {
  __shared__ Best warps[THREADS / WARP];
  for (int m = WARP / 2; m; m /= 2) best = better(best, {shuffle_xor(best.value, m), shuffle_xor(best.index, m)});
  __syncthreads();
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = best;
  __syncthreads();
  best = warps[0];
  for (int i = 1; i < THREADS / WARP; i++) best = better(best, warps[i]);
  return best;
}

// ids, values (rows,): the most likely token of each row of logits (rows, vocab) and its logit. One block a row.
template <int THREADS> DEVICE void argmax(const float* logits, i32* ids, float* values, int vocab) {
  wait_for_previous();
  let_next_start();
  const float* row = logits + i64(blockIdx.x) * vocab;
  Best best = {-__int_as_float(0x7f800000), 0};
  for (int i = threadIdx.x; i < vocab; i += THREADS) best = better(best, {row[i], i});
  best = block_best<THREADS>(best);
  if (threadIdx.x == 0) {
    ids[blockIdx.x] = best.index;
    values[blockIdx.x] = best.value;
  }
}
