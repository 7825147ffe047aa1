// out = f(x) W^T for few tokens: bound by the memory that the weights are read from.
//
// A block takes 32 rows of W, its warps every WARPS-th chunk of 32 columns. Weights go from memory into registers,
// several chunks ahead, and from there into tensor cores: rows are the M side of the product, tokens the N side, padded
// to 8. The warps' partial sums meet in shared memory. The first weights are asked for before the kernel that computes
// x has ended.
#pragma once
#include "weights.cuh"

// STAGED: x, at most as many tokens as `shared` has room for, lies in shared memory; NORM: normalized on its way there.
template <class Weights_, class Out_, int N_, int K_, int TOKEN_TILES_, int WARPS_, int AHEAD_, bool STAGED_,
          bool NORM_, bool GATED_>
struct StreamSpec {
  using Weights = Weights_;
  using Out = Out_;
  using Row = Rows<N_, GATED_>;
  static constexpr int N = N_, K = K_;                // rows and columns of W
  static constexpr int TOKEN_TILES = TOKEN_TILES_;    // of 8 tokens
  static constexpr int TOKENS = TOKEN_TILES * 8;
  static constexpr int WARPS = WARPS_, THREADS = WARPS * WARP;
  static constexpr int AHEAD = AHEAD_;                // chunks in flight per warp
  static constexpr int CHUNKS = (K + CHUNK - 1) / CHUNK;
  static constexpr int STEPS = (CHUNKS + WARPS - 1) / WARPS;  // of a warp
  static constexpr bool STAGED = STAGED_, NORM = NORM_, GATED = GATED_;
  static constexpr int PITCH = (STAGED ? 4 : TOKENS) + 1;  // floats of a row of sums
  static constexpr int SUMS = WARPS * 32 * PITCH;
  static constexpr int TOKEN_BYTES = K * 2 + ((K * 2) % 128 == 0 ? 64 : 0);  // of a staged token: spread over banks
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

// x / rms(x) * weight, rounded to T, of all n tokens into shared memory (Zhang and Sennrich 2019).
template <class S, class T> DEVICE void normalize_tokens(unsigned char* shared, const LinearArgs& args) {
  constexpr int VALUES = (S::K / 4 + S::THREADS - 1) / S::THREADS;  // float4s of a thread
  __shared__ float sums[S::WARPS];
  for (int token = 0; token < args.n; token++) {
    T* row = reinterpret_cast<T*>(shared + token * S::TOKEN_BYTES);
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

// The tokens in shared memory as the products want them; without NORM they are copied there.
template <class S> DEVICE void prepare_tokens(unsigned char* shared, const LinearArgs& args) {
  for (int token = 0; token < args.n; token++) {
    uint4* row = reinterpret_cast<uint4*>(shared + token * S::TOKEN_BYTES);
    const uint4* x = S::NORM ? row : reinterpret_cast<const uint4*>(static_cast<const u16*>(args.x) + i64(token) * S::K);
    for (int i = threadIdx.x; i < S::K / 8; i += S::THREADS) row[i] = S::Weights::prepare(x[i]);
  }
  __syncthreads();
}

// The eight activations from `column` on of a token of the block.
template <class S> DEVICE uint4 load_x(const unsigned char* shared, const LinearArgs& args, int token, int column) {
  int row = blockIdx.y * S::TOKENS + token;
  if (row >= args.n || (S::K % CHUNK != 0 && column >= S::K)) return make_uint4(0, 0, 0, 0);
  if constexpr (S::STAGED) return *reinterpret_cast<const uint4*>(shared + token * S::TOKEN_BYTES + column * 2);
  const u16* x = static_cast<const u16*>(args.x) + i64(row) * S::K + column;
  return S::Weights::prepare(*reinterpret_cast<const uint4*>(x));
}

template <class S>
DEVICE void put_sums(float* sums, const float (&sum)[2][S::TOKEN_TILES][4], int warp, int lane, int tokens) {
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
#pragma unroll
    for (int j = 0; j < S::TOKEN_TILES; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = S::Weights::slot_row(lane, 2 * tile + i / 2), token = j * 8 + 2 * (lane % 4) + i % 2;
        if (token < tokens) sums[(warp * 32 + r) * S::PITCH + token] = sum[tile][j][i];
      }
    }
  }
}

// The warps' sums added up and stored with what stands around the product.
template <class S> DEVICE void store_sums(const float* sums, const LinearArgs& args, int tokens) {
  using R = typename S::Row;
  for (int i = threadIdx.x; i < R::OUT_PER_BLOCK * tokens; i += S::THREADS) {
    int r = i % R::OUT_PER_BLOCK, token = i / R::OUT_PER_BLOCK;
    int row = blockIdx.x * R::OUT_PER_BLOCK + r, at = blockIdx.y * S::TOKENS + token;
    if (row >= R::OUT) continue;
    float v = 0, up = 0;
#pragma unroll
    for (int w = 0; w < S::WARPS; w++) {
      v += sums[(w * 32 + r) * S::PITCH + token];
      if (S::GATED) up += sums[(w * 32 + 16 + r) * S::PITCH + token];
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

// Grid: (ceil(N / 32) or N / 2 / 16, ceil(n / TOKENS)); STAGED: (…, 1). Shared memory: SUMS floats, and STAGED
// n * TOKEN_BYTES.
template <class S> DEVICE void linear_stream(const LinearArgs& args) {
  using Weights = typename S::Weights;
  DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  unsigned char* staged = shared + S::SUMS * 4;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  Weights weights(args.w, args.scale, args.minimum, blockIdx.x, lane);
  typename Weights::Chunk chunks[S::AHEAD];
#pragma unroll
  for (int i = 0; i < S::AHEAD; i++) {
    if (warp + i * S::WARPS < S::CHUNKS) chunks[i] = weights.load(warp + i * S::WARPS, lane);
  }
  wait_for_previous();
  let_next_start();
  if constexpr (S::NORM) normalize_tokens<S, typename Weights::Operand>(staged, args);
  if constexpr (S::STAGED) prepare_tokens<S>(staged, args);

  float sum[2][S::TOKEN_TILES][4] = {};
  for (int first = 0; first < S::STEPS; first += S::AHEAD) {
#pragma unroll
    for (int i = 0; i < S::AHEAD; i++) {
      int chunk = warp + (first + i) * S::WARPS, next = chunk + S::AHEAD * S::WARPS;
      if (chunk >= S::CHUNKS) break;
      uint4 x[S::TOKEN_TILES];
#pragma unroll
      for (int j = 0; j < S::TOKEN_TILES; j++) x[j] = load_x<S>(staged, args, j * 8 + g, chunk * CHUNK + t * 8);
      Weights::multiply(sum, chunks[i], x);
      if (next < S::CHUNKS) chunks[i] = weights.load(next, lane);
    }
  }
  int left = args.n - blockIdx.y * S::TOKENS, tokens = left < S::TOKENS ? left : S::TOKENS;
  put_sums<S>(sums, sum, warp, lane, tokens);
  __syncthreads();
  store_sums<S>(sums, args, tokens);
}
