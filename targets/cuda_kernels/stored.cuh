// Single values of stored matrices (mlcgen/formats.py), for kernels that look up rows or decode a matrix as a whole.
#pragma once
#include "primitives.cuh"

// 16- or 32-bit floats, row-major (N, K).
template <class T, int K> struct StoredFloats {
  const T* w;
  DEVICE StoredFloats(const void* w, const void*, const void*) : w(static_cast<const T*>(w)) {}
  DEVICE float at(i64 row, int column) const { return to_float(w[row * K + column]); }
};

// Codes in tiles of 16 rows, (N / 16, K * BITS / 32, 16) words, with scales and minima (N / 16, K / GROUP, 16).
template <int BITS, int GROUP, bool HAS_MINIMUM, int K> struct StoredGroups {
  static constexpr int TILE = 16, CODES = 32 / BITS;  // codes of a word
  const u8* codes;
  const f16 *scale, *minimum;
  DEVICE StoredGroups(const void* w, const void* scale, const void* minimum)
      : codes(static_cast<const u8*>(w)),
        scale(static_cast<const f16*>(scale)),
        minimum(static_cast<const f16*>(minimum)) {}
  DEVICE float at(i64 row, int column) const {
    i64 word = (row / TILE * (K / CODES) + column / CODES) * TILE + row % TILE;
    u32 byte = codes[word * 4 + column % 4];
    int code = BITS == 8 ? byte : column / 4 % 2 ? byte >> 4 : byte & 15;
    i64 group = (row / TILE * (K / GROUP) + column / GROUP) * TILE + row % TILE;
    float s = to_float(scale[group]);
    return HAS_MINIMUM ? code * s + to_float(minimum[group]) : (code - (1 << (BITS - 1))) * s;
  }
};

// out (n, K) = rows `ids` of the table. One block a token.
template <class Stored, int K>
DEVICE void embedding(const i32* ids, const void* w, const void* scale, const void* minimum, float* out) {
  Stored table(w, scale, minimum);
  wait_for_previous();
  let_next_start();
  i64 id = ids[blockIdx.x];
  for (int k = threadIdx.x; k < K; k += blockDim.x) out[i64(blockIdx.x) * K + k] = table.at(id, k);
}

// out (N, K) T row-major = the whole matrix. Grid: (ceil(K / 128), ceil(N / 16)), 256 threads: a block decodes 128
// columns of a stored tile word by word, and turns them through shared memory into rows.
template <int BITS, int GROUP, bool HAS_MINIMUM, class T, int N, int K>
DEVICE void decode_matrix(const void* w, const f16* scale, const f16* minimum, T* out) {
  constexpr int TILE = 16, COLUMNS = 128, CODES = 32 / BITS, WORDS = COLUMNS / CODES * TILE, THREADS = 256;
  __shared__ __align__(16) T block[TILE][COLUMNS + 8];
  int tile = blockIdx.y, column = blockIdx.x * COLUMNS;
  for (int i = threadIdx.x; i < WORDS; i += THREADS) {
    int r = i % TILE, k = i / TILE * CODES;
    if (column + k >= K) break;
    u32 word = static_cast<const u32*>(w)[(i64(tile) * (K / CODES) + (column + k) / CODES) * TILE + r];
    i64 group = (i64(tile) * (K / GROUP) + (column + k) / GROUP) * TILE + r;
    float s = to_float(scale[group]), m = HAS_MINIMUM ? to_float(minimum[group]) : -s * (1 << (BITS - 1));
#pragma unroll
    for (int j = 0; j < CODES; j++) {  // byte j % 4; its high half holds the second four columns of 4 bits
      u32 code = word >> (j % 4 * 8 + j / 4 * 4) & ((1 << BITS) - 1);
      block[r][k + j] = from_float<T>(code * s + m);
    }
  }
  wait_for_previous();  // `out` may still be read by the kernel before
  let_next_start();
  __syncthreads();
  int r = threadIdx.x / 16, k = threadIdx.x % 16 * 8;
  if (tile * TILE + r < N && column + k < K) {
    *reinterpret_cast<uint4*>(out + (i64(tile) * TILE + r) * K + column + k) = *reinterpret_cast<uint4*>(&block[r][k]);
  }
}

// out (16 * tiles, K) row-major = in (tiles, K, 16), elements of 16 or 32 bits. Grid: (ceil(K / 64), tiles), 256 threads.
template <class E> DEVICE void untile(const E* in, E* out, int columns) {
  __shared__ E block[16][65];
  int column = blockIdx.x * 64;
  const E* from = in + (i64(blockIdx.y) * columns + column) * 16;
  for (int i = threadIdx.x; i < 64 * 16; i += blockDim.x) {
    if (column + i / 16 < columns) block[i % 16][i / 16] = from[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * 16; i += blockDim.x) {
    int r = i / 64, k = column + i % 64;
    if (k < columns) out[(i64(blockIdx.y) * 16 + r) * columns + k] = block[r][i % 64];
  }
}

DEVICE u64 mix(u64 x) {  // splitmix64 (Steele, Lea, Flood 2014)
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Weights for measuring: normal floats of a deviation, or random bits where `deviation` is 0 (codes).
template <class E> DEVICE void random_fill(E* out, i64 count, float mean, float deviation, int seed) {
  i64 stride = i64(gridDim.x) * blockDim.x;
  for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    u64 bits = mix(mix(u64(seed)) ^ u64(i));
    float sum = 0;  // of four uniform numbers: near enough to normal
    for (int j = 0; j < 4; j++) sum += float((bits >> (16 * j)) & 0xffff) * (1.0f / 65536.0f) - 0.5f;
    out[i] = from_float<E>(mean + deviation * 1.7320508f * sum);
  }
}
template <> DEVICE void random_fill<u8>(u8* out, i64 count, float, float, int seed) {
  i64 stride = i64(gridDim.x) * blockDim.x;
  for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) out[i] = u8(mix(mix(u64(seed)) ^ u64(i)));
}
