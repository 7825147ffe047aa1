// out (n, N) = x (n, K) W (N, K)^T for many tokens, on the tensor cores of any GPU since sm_80 (mma).
//
// A block multiplies TOKENS tokens by ROWS rows of W; each of its four warps computes a quarter of that, two by two.
// Tiles of x and W, COLUMNS columns at a time, are copied into a ring of STAGES buffers in shared memory. From there
// ldmatrix makes fragments, for one step of 16 columns while the products of the step before are under way:
//
//   memory  --copy_async-->  ring  --ldmatrix-->  fragments  --mma-->  sums
//            STAGES - 1 tiles ahead        1 step ahead
//
// GATED: rows of W's tiles alternate, 8 of the gate and the 8 of the up projection that belong to the same features, so
// that the lane that has a sum of one has the matching sum of the other.
#pragma once
#include "primitives.cuh"

namespace gemm_mma {

template <class T_, class Out_, int N_, int K_, int TOKENS_, int ROWS_, int COLUMNS_, int STAGES_, bool GATED_>
struct Spec {
  using T = T_;                                   // of x and W
  using Out = Out_;
  static constexpr int N = N_, K = K_;            // rows and columns of W
  static constexpr int TOKENS = TOKENS_;          // of a block
  static constexpr int ROWS = ROWS_;              // of W, of a block
  static constexpr int COLUMNS = COLUMNS_, STAGES = STAGES_;
  static constexpr bool GATED = GATED_;
  static constexpr int WIDTH = GATED ? N / 2 : N;                // of the result
  static constexpr int FEATURES = GATED ? ROWS / 2 : ROWS;       // of the result, of a block
  static constexpr int THREADS = 4 * WARP;
  static constexpr int WARP_TOKENS = TOKENS / 2, WARP_ROWS = ROWS / 2;
  static constexpr int TOKEN_BLOCKS = WARP_TOKENS / 16, ROW_BLOCKS = WARP_ROWS / 8;  // of an mma
  static constexpr int STEPS = COLUMNS / 16;                     // of a tile, one mma deep
  static constexpr int TILES = (K + COLUMNS - 1) / COLUMNS;      // along k
  static constexpr int STAGE = (TOKENS + ROWS) * COLUMNS;        // values
  static_assert(K % 8 == 0, "copies take 8 values");
  static_assert(STEPS % 2 == 0, "two sets of fragments take turns");
  static_assert(TOKENS % 32 == 0 && ROWS % 32 == 0, "warps load 16 rows at a time");
};

// Where the 8 values (16 bytes) of a chunk of a row lie in a tile. Chunks are permuted within a row so that the same
// chunk of 8 consecutive rows, which is what ldmatrix reads at a time, lies in 8 different groups of 4 banks.
template <int COLUMNS> DEVICE int chunk_offset(int row, int chunk) {
  static_assert(COLUMNS == 32 || COLUMNS == 64, "a row of 64 or 128 bytes: half of the banks or all");
  return row * COLUMNS + (chunk ^ (COLUMNS == 64 ? row & 7 : row >> 1 & 3)) * 8;
}

// The row of W that row `r` of the block's tile is. Beyond the matrix: its last row, whose products are not stored.
template <class S> DEVICE int row_of_weights(int r) {
  int feature = blockIdx.y * S::FEATURES + (S::GATED ? r / 16 * 8 + r % 8 : r);
  return min(feature, S::WIDTH - 1) + (S::GATED && r & 8 ? S::WIDTH : 0);
}

// What a thread copies of a matrix's tiles: one chunk of every ROWS_AT_ONCE-th of ROWS rows.
template <class S, int ROWS> struct TileCopier {
  using T = typename S::T;
  static constexpr int CHUNKS = S::COLUMNS / 8, ROWS_AT_ONCE = S::THREADS / CHUNKS, COUNT = ROWS / ROWS_AT_ONCE;
  static_assert(ROWS_AT_ONCE % 8 == 0 && ROWS % ROWS_AT_ONCE == 0);  // so chunks of all its rows are permuted alike

  const T* from[COUNT];
  int to;

  template <class RowOf> DEVICE TileCopier(const T* matrix, RowOf row_of) {
    int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    to = chunk_offset<S::COLUMNS>(row, chunk);
#pragma unroll
    for (int i = 0; i < COUNT; i++) from[i] = matrix + i64(row_of(row + i * ROWS_AT_ONCE)) * S::K + chunk * 8;
  }

  // Columns beyond the matrix become zeros.
  DEVICE void start(T* tile, int first_column) const {
    int column = first_column + threadIdx.x % CHUNKS * 8;
    bool inside = S::K % S::COLUMNS == 0 || column < S::K;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      copy_async(tile + to + i * ROWS_AT_ONCE * S::COLUMNS, from[i] + first_column, inside);
    }
  }
};

// A warp's operands of one step.
template <class S> struct Fragments {
  u32 x[S::TOKEN_BLOCKS][4];
  u32 w[S::ROW_BLOCKS / 2][4];  // of two blocks each

  // `stage`: a tile of x, then one of W.
  DEVICE void load(const typename S::T* stage, int step) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int token = warp / 2 * S::WARP_TOKENS + (lane & 15);                             // matrices: rows, then columns
    int row = S::TOKENS + warp % 2 * S::WARP_ROWS + (lane & 7) + (lane >> 4) * 8;    // columns, then rows
    const typename S::T* tokens = stage + chunk_offset<S::COLUMNS>(token, step * 2 + (lane >> 4));
    const typename S::T* rows = stage + chunk_offset<S::COLUMNS>(row, step * 2 + (lane >> 3 & 1));
#pragma unroll
    for (int i = 0; i < S::TOKEN_BLOCKS; i++) ldmatrix(x[i], tokens + i * 16 * S::COLUMNS);
#pragma unroll
    for (int j = 0; j < S::ROW_BLOCKS / 2; j++) ldmatrix(w[j], rows + j * 16 * S::COLUMNS);
  }
};

// A warp's sums. Lane (g, t) = (lane / 4, lane % 4) has of each block the tokens g and g + 8, rows 2t and 2t + 1 of W.
template <class S> struct Sums {
  float values[S::TOKEN_BLOCKS][S::ROW_BLOCKS][4] = {};

  DEVICE void multiply(const Fragments<S>& f) {
#pragma unroll
    for (int j = 0; j < S::ROW_BLOCKS; j++) {
      const u32 w[2] = {f.w[j / 2][j % 2 * 2], f.w[j / 2][j % 2 * 2 + 1]};
#pragma unroll
      for (int i = 0; i < S::TOKEN_BLOCKS; i++) mma<typename S::T>(values[i][j], f.x[i], w);
    }
  }
};

// The whole product along k. copy(stage, tile) starts the copies of a tile.
template <class S, class Copy> DEVICE void multiply_tiles(Sums<S>& sums, typename S::T* ring, Copy copy) {
#pragma unroll
  for (int tile = 0; tile < S::STAGES - 1; tile++) {
    if (tile < S::TILES) copy(ring + tile * S::STAGE, tile);
    commit_copies();
  }
  Fragments<S> fragments[2];
  wait_copies<S::STAGES - 2>();
  __syncthreads();
  fragments[0].load(ring, 0);
  int stage = 0, spare = S::STAGES - 1;  // with the tile, and with the one before
#pragma unroll 1
  for (int tile = 0; tile < S::TILES; tile++) {
    int next = stage == S::STAGES - 1 ? 0 : stage + 1;
#pragma unroll
    for (int step = 0; step < S::STEPS; step++) {
      bool is_last = step == S::STEPS - 1;
      if (is_last) {  // the next tile has arrived, for all threads, which have also read this one
        wait_copies<S::STAGES - 2>();
        __syncthreads();
      }
      // After the last tile that is what an old one left, or nothing; it is not used.
      fragments[(step + 1) % 2].load(ring + (is_last ? next : stage) * S::STAGE, (step + 1) % S::STEPS);
      if (step == 0) {
        if (tile + S::STAGES - 1 < S::TILES) copy(ring + spare * S::STAGE, tile + S::STAGES - 1);
        commit_copies();
      }
      sums.multiply(fragments[step % 2]);
    }
    spare = stage, stage = next;
  }
}

// ---- what stands around the product ----

struct Around {
  const float* bias;      // (N,) or null
  const float* residual;  // (n, WIDTH) or null
};

DEVICE float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }  // a fraction of the instructions of /

// Values of neighbouring columns, the second of which may lie beyond the matrix.
template <bool WHOLE> DEVICE float2 load_pair(const float* p, bool has_second) {
  if constexpr (WHOLE) return *reinterpret_cast<const float2*>(p);
  return make_float2(p[0], has_second ? p[1] : 0);
}
template <bool WHOLE, class Out> DEVICE void store_pair(Out* p, float2 v, bool has_second) {
  if constexpr (!WHOLE) {
    p[0] = from_float<Out>(v.x);
    if (has_second) p[1] = from_float<Out>(v.y);
  } else if constexpr (sizeof(Out) == 2) {
    *reinterpret_cast<u32*>(p) = pack<Out>(v.x, v.y);
  } else {
    *reinterpret_cast<float2*>(p) = v;
  }
}

template <class S> DEVICE void store(const Sums<S>& sums, const Around& around, typename S::Out* out, int n) {
  constexpr bool WHOLE = S::WIDTH % 2 == 0;  // pairs of columns
  constexpr int BLOCKS = S::GATED ? 2 : 1;   // of rows of W, for 8 features
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int first_token = blockIdx.x * S::TOKENS + warp / 2 * S::WARP_TOKENS + lane / 4;
  int first_feature = blockIdx.y * S::FEATURES + warp % 2 * (S::WARP_ROWS / BLOCKS) + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < S::ROW_BLOCKS / BLOCKS; j++) {
    int feature = first_feature + j * 8;
    if (feature >= S::WIDTH) break;
    bool has_second = WHOLE || feature + 1 < S::WIDTH;
    float2 bias = make_float2(0, 0), up_bias = bias;
    if (around.bias) {
      bias = load_pair<WHOLE>(around.bias + feature, has_second);
      if (S::GATED) up_bias = load_pair<WHOLE>(around.bias + S::WIDTH + feature, has_second);
    }
#pragma unroll
    for (int i = 0; i < S::TOKEN_BLOCKS * 2; i++) {  // halves of blocks: 8 tokens
      int token = first_token + i * 8, at = i % 2 * 2;
      if (token >= n) break;
      const float(&sum)[4] = sums.values[i / 2][j * BLOCKS];
      float2 v = make_float2(sum[at] + bias.x, sum[at + 1] + bias.y);
      if constexpr (S::GATED) {
        const float(&up)[4] = sums.values[i / 2][j * BLOCKS + 1];
        v = make_float2(silu(v.x) * (up[at] + up_bias.x), silu(v.y) * (up[at + 1] + up_bias.y));
      }
      i64 place = i64(token) * S::WIDTH + feature;
      if (around.residual) {
        float2 r = load_pair<WHOLE>(around.residual + place, has_second);
        v = make_float2(v.x + r.x, v.y + r.y);
      }
      store_pair<WHOLE>(out + place, v, has_second);
    }
  }
}

// Grid: (ceil(n / TOKENS), ceil(WIDTH / FEATURES)): blocks at work at the same time share rows of W in the cache.
// Shared memory: STAGES * STAGE values.
template <class S>
DEVICE void gemm_block(const void* x, const void* w, const Around& around, typename S::Out* out, int n) {
  using T = typename S::T;
  DYNAMIC_SHARED(shared);
  wait_for_previous();  // which may be what decodes W
  let_next_start();
  TileCopier<S, S::TOKENS> tokens(static_cast<const T*>(x),
                                  [&](int r) { return min(int(blockIdx.x) * S::TOKENS + r, n - 1); });
  TileCopier<S, S::ROWS> rows(static_cast<const T*>(w), [](int r) { return row_of_weights<S>(r); });
  Sums<S> sums;
  multiply_tiles<S>(sums, reinterpret_cast<T*>(shared), [&](T* stage, int tile) {
    tokens.start(stage, tile * S::COLUMNS);
    rows.start(stage + S::TOKENS * S::COLUMNS, tile * S::COLUMNS);
  });
  store<S>(sums, around, out, n);
}

}  // namespace gemm_mma
