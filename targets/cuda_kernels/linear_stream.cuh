// out = f(x) W^T for few tokens: bound by the memory that the weights are read from.
//
// A block takes 32 rows of W, its warps every WARPS-th chunk of 32 columns. Weights go from memory into registers,
// several chunks ahead, and from there into tensor cores: rows are the M side of the product, tokens the N side, padded
// to 8. The warps' partial sums meet in shared memory. The first weights are asked for before the kernel that
// computes x has ended.
#pragma once
#include "weights.cuh"

template <class Weights_, class Out_, int N_, int K_, int TOKEN_TILES_, int WARPS_, int AHEAD_, bool NORM_, bool GATED_>
struct StreamSpec {
  using Weights = Weights_;
  using Out = Out_;
  static constexpr int N = N_, K = K_;                // rows and columns of W
  static constexpr int TOKEN_TILES = TOKEN_TILES_;    // of 8 tokens
  static constexpr int TOKENS = TOKEN_TILES * 8;
  static constexpr int WARPS = WARPS_, THREADS = WARPS * WARP;
  static constexpr int AHEAD = AHEAD_;                // chunks in flight per warp
  static constexpr int CHUNKS = (K + CHUNK - 1) / CHUNK;
  static constexpr int STEPS = (CHUNKS + WARPS - 1) / WARPS;
  static constexpr bool NORM = NORM_, GATED = GATED_;
  static constexpr int ROW_BYTES = K * 2 + ((K * 2) % 128 == 0 ? 64 : 0);  // of a normalized token: spread over banks
};

struct LinearArgs {
  const void* x;            // (n, K) float with NORM, else the operand's type
  const float* norm;        // (K,) with NORM
  const void* w;
  const void* scale;
  const void* minimum;
  const float* bias;        // (N,) or null
  const float* residual;    // (n, N) or null; not with GATED
  void* out;                // (n, N), GATED: (n, N / 2)
  int n;
  float eps;
};

// x / rms(x) * weight, rounded to T, of all n tokens (n <= TOKENS) into shared memory.
template <class S, class T> DEVICE void normalize_tokens(unsigned char* shared, const LinearArgs& args) {
  constexpr int VALUES = (S::K / 4 + S::THREADS - 1) / S::THREADS;  // float4s of a thread
  __shared__ float sums[S::WARPS];
  for (int token = 0; token < args.n; token++) {
    T* row = reinterpret_cast<T*>(shared + token * S::ROW_BYTES);
    const float4* x = reinterpret_cast<const float4*>(static_cast<const float*>(args.x) + i64(token) * S::K);
    float4 v[VALUES];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      int at = i * S::THREADS + threadIdx.x;
      v[i] = at < S::K / 4 ? x[at] : make_float4(0, 0, 0, 0);
      sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    }
    sum = warp_sum(sum);
    __syncthreads();
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < S::WARPS; i++) sum += sums[i];
    float r = rsqrtf(sum / S::K + args.eps);
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      int at = i * S::THREADS + threadIdx.x;
      if (at < S::K / 4) {
        float4 g = reinterpret_cast<const float4*>(args.norm)[at];
        reinterpret_cast<uint2*>(row)[at] = make_uint2(pack<T>(v[i].x * r * g.x, v[i].y * r * g.y),
                                                       pack<T>(v[i].z * r * g.z, v[i].w * r * g.w));
      }
    }
  }
  __syncthreads();
}

// The eight activations of this lane in a chunk, for its token of a tile.
template <class S> DEVICE uint4 load_x(const unsigned char* shared, const LinearArgs& args, int token, int column) {
  using T = typename S::Weights::Operand;
  int row = blockIdx.y * S::TOKENS + token;
  if (row >= args.n || (S::K % CHUNK != 0 && column >= S::K)) return make_uint4(0, 0, 0, 0);
  if constexpr (S::NORM) {
    return *reinterpret_cast<const uint4*>(shared + token * S::ROW_BYTES + column * 2);
  } else {
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(args.x) + i64(row) * S::K + column);
  }
}

// The warps' sums, (32 rows, TOKENS) each, added up and stored with what stands around the product.
template <class S> DEVICE void store_sums(float* sums, const LinearArgs& args) {
  using R = Rows<S::N, S::GATED>;
  constexpr int PITCH = S::TOKENS + 1;
  for (int i = threadIdx.x; i < R::OUT_PER_BLOCK * S::TOKENS; i += S::THREADS) {
    int r = i % R::OUT_PER_BLOCK, token = i / R::OUT_PER_BLOCK;
    int row = blockIdx.x * R::OUT_PER_BLOCK + r, at = blockIdx.y * S::TOKENS + token;
    if (row >= R::OUT || at >= args.n) continue;
    float v = 0, up = 0;
    for (int w = 0; w < S::WARPS; w++) {
      v += sums[(w * 32 + r) * PITCH + token];
      if (S::GATED) up += sums[(w * 32 + 16 + r) * PITCH + token];
    }
    if (args.bias) {
      v += args.bias[row];
      if (S::GATED) up += args.bias[S::N / 2 + row];
    }
    if (S::GATED) v = v / (1.0f + __expf(-v)) * up;
    if (args.residual) v += args.residual[i64(at) * R::OUT + row];
    static_cast<typename S::Out*>(args.out)[i64(at) * R::OUT + row] = from_float<typename S::Out>(v);
  }
}

// Grid: (ceil(N / 32) or N / 2 / 16, ceil(n / TOKENS)); with NORM (…, 1). Shared memory: the larger of n * ROW_BYTES with
// NORM and WARPS * 32 * (TOKENS + 1) floats.
template <class S> DEVICE void linear_stream(const LinearArgs& args) {
  using Weights = typename S::Weights;
  using T = typename Weights::Operand;
  DYNAMIC_SHARED(shared);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  Weights weights(args.w, args.scale, args.minimum, blockIdx.x, lane);
  typename Weights::Chunk chunks[S::AHEAD];
#pragma unroll
  for (int i = 0; i < S::AHEAD; i++) {
    if (warp + i * S::WARPS < S::CHUNKS) chunks[i] = weights.load(warp + i * S::WARPS, lane);
  }
  wait_for_previous();
  let_next_start();
  if constexpr (S::NORM) normalize_tokens<S, T>(shared, args);
  uint4 x[S::AHEAD][S::TOKEN_TILES];
  auto load_tokens = [&](int i, int chunk) {
#pragma unroll
    for (int j = 0; j < S::TOKEN_TILES; j++) x[i][j] = load_x<S>(shared, args, j * 8 + g, chunk * CHUNK + t * 8);
  };
#pragma unroll
  for (int i = 0; i < S::AHEAD; i++) {
    if (warp + i * S::WARPS < S::CHUNKS) load_tokens(i, warp + i * S::WARPS);
  }
  float sum[2][S::TOKEN_TILES][4] = {};
  for (int first = 0; first < S::STEPS; first += S::AHEAD) {
#pragma unroll
    for (int i = 0; i < S::AHEAD; i++) {
      int chunk = warp + (first + i) * S::WARPS, next = chunk + S::AHEAD * S::WARPS;
      if (chunk >= S::CHUNKS) break;
#pragma unroll
      for (int j = 0; j < S::TOKEN_TILES; j++) x[i][j] = Weights::order(x[i][j]);
#pragma unroll
      for (int step = 0; step < 2; step++) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
          u32 a[4];
          Weights::fragment(a, chunks[i], tile, step);
#pragma unroll
          for (int j = 0; j < S::TOKEN_TILES; j++) {
            u32 b[2] = {word(x[i][j], 2 * step), word(x[i][j], 2 * step + 1)};
            mma<T>(sum[tile][j], a, b);
          }
        }
      }
      if (next < S::CHUNKS) {
        chunks[i] = weights.load(next, lane);
        load_tokens(i, next);
      }
    }
  }
  if (S::NORM) __syncthreads();  // the sums take the place of the tokens
  float* sums = reinterpret_cast<float*>(shared);
  constexpr int PITCH = S::TOKENS + 1;
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
#pragma unroll
    for (int j = 0; j < S::TOKEN_TILES; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = Weights::slot_row(lane, 2 * tile + i / 2);
        sums[(warp * 32 + r) * PITCH + j * 8 + 2 * t + i % 2] = sum[tile][j][i];
      }
    }
  }
  __syncthreads();
  store_sums<S>(sums, args);
}
