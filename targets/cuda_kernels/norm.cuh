// out (n, K) = x / rms(x) * weight, x float32, one block a token (Zhang and Sennrich 2019).
#pragma once
#include "primitives.cuh"

template <class T, int K, int THREADS>
DEVICE void rms_norm(const float* x, const float* weight, T* out, float eps) {
  static_assert(K % 4 == 0);
  constexpr int VALUES = (K / 4 + THREADS - 1) / THREADS;  // float4s of a thread
  __shared__ float sums[THREADS / WARP];
  wait_for_previous();
  let_next_start();
  const float4* row = reinterpret_cast<const float4*>(x + i64(blockIdx.x) * K);
  float4 v[VALUES];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < VALUES; i++) {
    int at = i * THREADS + threadIdx.x;
    v[i] = at < K / 4 ? row[at] : make_float4(0, 0, 0, 0);
    sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < THREADS / WARP; i++) sum += sums[i];
  float r = rsqrtf(sum / K + eps);
#pragma unroll
  for (int i = 0; i < VALUES; i++) {
    int at = i * THREADS + threadIdx.x;
    if (at >= K / 4) break;
    float4 g = reinterpret_cast<const float4*>(weight)[at];
    reinterpret_cast<uint2*>(out + i64(blockIdx.x) * K)[at] =
        make_uint2(pack<T>(v[i].x * r * g.x, v[i].y * r * g.y), pack<T>(v[i].z * r * g.z, v[i].w * r * g.w));
  }
}

// out = x in another type, element by element; `count` is a multiple of 4.
template <class From, class To> DEVICE void convert(const From* x, To* out, i64 count) {
  wait_for_previous();
  let_next_start();
  i64 at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (at >= count) return;
  for (int i = 0; i < 4; i++) out[at + i] = from_float<To>(to_float(x[at + i]));
}
