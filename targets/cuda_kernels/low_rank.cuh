// y += f(x) A^T B^T with each token's own A and B: the path of low-rank adapters (Punica, Chen et al. 2023), stored as
// mlcgen/adapter_layout.py says.
//
// Two kernels: h = f(x) A^T, the columns of A in SPLITS shares, and y += h B^T, which adds the shares up. Of GROUP
// neighbouring tokens the first of each adapter computes for all that have it, so these share what is read of A, and
// where they are many of B; the others, and tokens without an adapter, have nothing to do. What is stored is asked for
// before the kernel before has ended: only activations are of it.
#pragma once
#include "primitives.cuh"

namespace low_rank {

constexpr int TILE = 16;  // rows of A or B that are stored together
constexpr int GROUP = 8;

// Which tokens of the group have the adapter of `token`, a bit each; 0 where an earlier one has it.
DEVICE u32 members(const i32* slots, int token, int n) {
  int first = token / GROUP * GROUP;
  u32 found = 0;
  for (int i = 0; i < GROUP; i++) {
    if (first + i < n && slots[first + i] == slots[token]) found |= 1u << i;
  }
  return found & ((1u << token % GROUP) - 1) ? 0 : found;
}

// The group's member number `index`; the last one where there are fewer.
DEVICE int nth_member(u32 members, int token, int index) {
  for (; index > 0 && (members & (members - 1)); index--) members &= members - 1;
  return token / GROUP * GROUP + __ffs(members) - 1;
}

// Values at..at + 3 of a row of LENGTH as floats; zeros behind its end.
template <int LENGTH, class T> DEVICE void load_four(float (&v)[4], const T* row, int at) {
  if constexpr (LENGTH % 4 != 0) {
    for (int i = 0; i < 4; i++) v[i] = at + i < LENGTH ? to_float(row[at + i]) : 0;
  } else if (at >= LENGTH) {
    for (int i = 0; i < 4; i++) v[i] = 0;
  } else if constexpr (sizeof(T) == 4) {
    float4 four = *reinterpret_cast<const float4*>(row + at);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
    uint2 four = *reinterpret_cast<const uint2*>(row + at);
    float2 low = unpack<T>(four.x), high = unpack<T>(four.y);
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
  }
}

// ---- h = f(x) A^T ----

template <class X_, int K_, int TILES_, int SPLITS_, bool NORM_> struct ShrinkSpec {
  using X = X_;
  static constexpr int K = K_, TILES = TILES_, SPLITS = SPLITS_;  // TILES: of all parts' rows of A
  static constexpr bool NORM = NORM_;
  static constexpr int WARPS = 4, THREADS = WARPS * WARP;
  static constexpr int STEP = THREADS / 2 * 4;  // columns at a time: two threads share four
  static constexpr int SHARE = ((K + STEP - 1) / STEP + SPLITS - 1) / SPLITS * STEP;
  static constexpr int PITCH = TILES * TILE + 4;  // floats of a token's share: its h, and the sum of x^2
};

struct ShrinkArgs {
  const void* x;      // (n, K)
  const float* norm;  // (K,) with NORM
  const i32* slots;   // (n,)
  const f16* a;       // (slots, TILES, K, 16)
  float* shares;      // (n, SPLITS, PITCH)
  int n;
};

// Of four columns of A, half a tile's rows.
struct Columns {
  uint4 rows[4];
};

template <class S> DEVICE Columns load_columns(const f16* tile, int column, int half) {
  Columns found;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    bool there = S::K % 4 == 0 ? column < S::K : column + j < S::K;
    found.rows[j] = there ? load_once(tile + i64(column + j) * TILE + half * 8) : make_uint4(0, 0, 0, 0);
  }
  return found;
}

// The sums of v over the 16 lanes of this one's parity, who share the values out: v[0], v[1], ... are then those from
// the returned index on.
template <int COUNT, int BIT = WARP / 2, int SIZE> DEVICE int sum_lanes(float (&v)[SIZE], int lane) {
  if constexpr (BIT == 1) {
    return 0;
  } else if constexpr (COUNT == 1) {
    v[0] += shuffle_xor(v[0], BIT);
    return sum_lanes<1, BIT / 2>(v, lane);
  } else {
    constexpr int HALF = COUNT / 2;
    bool upper = lane & BIT;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      float sent = upper ? v[i] : v[i + HALF], kept = upper ? v[i + HALF] : v[i];
      v[i] = kept + shuffle_xor(sent, BIT);
    }
    return (upper ? HALF : 0) + sum_lanes<HALF, BIT / 2>(v, lane);
  }
}

// For up to COUNT members of a group.
template <class S, int COUNT> DEVICE void shrink(const ShrinkArgs& args, int token, u32 members) {
  using X = typename S::X;
  __shared__ float sums[S::WARPS][COUNT * TILE], squares[S::WARPS][COUNT];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, half = lane % 2;
  int tile = blockIdx.x % S::TILES, split = blockIdx.x / S::TILES;
  int tokens[COUNT];
#pragma unroll
  for (int c = 0; c < COUNT; c++) tokens[c] = nth_member(members, token, c);
  const f16* a = args.a + (i64(args.slots[token]) * S::TILES + tile) * S::K * TILE;
  int column = split * S::SHARE + threadIdx.x / 2 * 4, end = min((split + 1) * S::SHARE, S::K);
  Columns next = load_columns<S>(a, column, half);
  wait_for_previous();

  float sum[COUNT * 8] = {}, square[COUNT] = {};
  for (; column < end; column += S::STEP) {
    Columns here = next;
    if (column + S::STEP < end) next = load_columns<S>(a, column + S::STEP, half);
    float norm[4];
    if constexpr (S::NORM) load_four<S::K>(norm, args.norm, column);
    float rows[4][8];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 words[4] = {here.rows[j].x, here.rows[j].y, here.rows[j].z, here.rows[j].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float2 pair = unpack<f16>(words[i]);
        rows[j][2 * i] = pair.x, rows[j][2 * i + 1] = pair.y;
      }
    }
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
      float x[4];
      load_four<S::K>(x, static_cast<const X*>(args.x) + i64(tokens[c]) * S::K, column);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if constexpr (S::NORM) square[c] += x[j] * x[j], x[j] *= norm[j];
#pragma unroll
        for (int i = 0; i < 8; i++) sum[c * 8 + i] += x[j] * rows[j][i];
      }
    }
  }

  int first = sum_lanes<COUNT * 8>(sum, lane);
#pragma unroll
  for (int i = 0; i < (COUNT + 1) / 2; i++) {
    sums[warp][(first + i) / 8 * TILE + half * 8 + (first + i) % 8] = sum[i];
  }
  if (S::NORM && tile == 0) {
#pragma unroll
    for (int c = 0; c < COUNT; c++) squares[warp][c] = warp_sum(square[c]) / 2;  // two lanes had the same columns
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    float* share = args.shares + (i64(tokens[c]) * S::SPLITS + split) * S::PITCH;
    int row = int(threadIdx.x) - c * TILE;
    if (c >= __popc(members) || row < 0 || row >= TILE) continue;
    float total = 0, total_square = 0;
    for (int w = 0; w < S::WARPS; w++) total += sums[w][c * TILE + row];
    share[tile * TILE + row] = total;
    if (!S::NORM || tile != 0 || row != 0) continue;
    for (int w = 0; w < S::WARPS; w++) total_square += squares[w][c];
    share[S::TILES * TILE] = total_square;
  }
  __syncthreads();  // sums are those of the next adapter then
}

// Grid: (TILES * SPLITS, ceil(n / TOKENS)): a block takes TOKENS tokens, one or a group, each with its members.
template <class S, int TOKENS> DEVICE void shrink_tokens(const ShrinkArgs& args) {
  let_next_start();  // which has B to ask for
  int end = min((int(blockIdx.y) + 1) * TOKENS, args.n);
  for (int token = blockIdx.y * TOKENS; token < end; token++) {
    u32 found = args.slots[token] < 0 ? 0 : members(args.slots, token, args.n);
    if (__popc(found) == 1) shrink<S, 1>(args, token, found);
    if (__popc(found) > 1) shrink<S, GROUP>(args, token, found);
  }
  wait_for_previous();  // or the next kernel would take the one before for ended
}

// ---- y += h B^T ----

// N: features of each part. GATED: of two parts of one size, out = silu(first) * second.
template <class Out_, int K_, int RANK_, int SPLITS_, bool NORM_, bool GATED_, int... N_> struct ExpandSpec {
  using Out = Out_;
  static constexpr int K = K_, RANK = RANK_, SPLITS = SPLITS_;
  static constexpr bool NORM = NORM_, GATED = GATED_;
  static constexpr int THREADS = 64, FEATURES = THREADS * 4;  // of a block: four of a thread
  static constexpr int PARTS = sizeof...(N_), HALVES = GATED ? 2 : 1;
  static constexpr int PITCH = (PARTS * RANK + TILE - 1) / TILE * TILE + 4;  // as in ShrinkSpec
  static constexpr int N = (N_ + ...), TILES = (((N_ + TILE - 1) / TILE) + ...);
  static constexpr bool ALIGNED = ((N_ % 4 == 0) && ...);

  // Where a block's features are.
  struct Place {
    int part, features;    // features: of the part
    int tile, column;      // the part's first of B, and of y
    int block;             // of the part's
  };
  DEVICE static Place place(int block) {
    constexpr int sizes[] = {N_...};
    Place at = {0, sizes[0], 0, 0, block};
#pragma unroll
    for (int i = 0; i + 1 < PARTS; i++) {
      int blocks = (sizes[i] + FEATURES - 1) / FEATURES;
      if (at.part < i || at.block < blocks) continue;
      at = {i + 1, sizes[i + 1], at.tile + (sizes[i] + TILE - 1) / TILE, at.column + sizes[i], at.block - blocks};
    }
    return at;
  }
};

struct ExpandArgs {
  const float* shares;  // as in ShrinkArgs
  const i32* slots;     // (n,)
  const f16* b;         // (slots, TILES, RANK, 16)
  float* y;             // (n, N)
  void* out;            // (n, N / 2) with GATED
  int n;
  float eps;
};

// What the shares of COUNT members add up to: h[half][row * COUNT + c], and with NORM the sums of x^2. Each thread takes
// some rows of some tokens.
template <class S, int COUNT>
DEVICE void add_shares(float (&h)[S::HALVES][S::RANK * COUNT], float (&squares)[COUNT], const ExpandArgs& args,
                       int token, u32 members, int part) {
  constexpr int OF_H = S::HALVES * S::RANK, ROWS = OF_H + S::NORM;
#pragma unroll 2
  for (int i = threadIdx.x; i < COUNT * ROWS; i += S::THREADS) {
    int c = i / ROWS, row = i % ROWS;
    const float* shares = args.shares + i64(nth_member(members, token, c)) * S::SPLITS * S::PITCH;
    shares += row < OF_H ? part * S::RANK + row : S::PITCH - 4;
    float total = 0;
#pragma unroll
    for (int s = 0; s < S::SPLITS; s++) total += shares[s * S::PITCH];
    if (row < OF_H) {
      h[row / S::RANK][row % S::RANK * COUNT + c] = total;
    } else {
      squares[c] = total;
    }
  }
}

// Four values; where they are not ALIGNED, `left` if that is fewer.
template <bool ALIGNED, class T> DEVICE void store_four(T* to, const float (&v)[4], int left) {
  if constexpr (!ALIGNED) {
    for (int j = 0; j < 4; j++) {
      if (j < left) to[j] = from_float<T>(v[j]);
    }
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
  }
}

// Adds the four sums to y, or with GATED writes what SwiGLU makes of both halves.
template <class S>
DEVICE void store(const ExpandArgs& args, int token, int column, int left, const float (&sums)[S::HALVES][4]) {
  float* y = args.y + i64(token) * S::N + column;
  float v[S::HALVES][4];
#pragma unroll
  for (int half = 0; half < S::HALVES; half++) {
    const float* from = y + half * (S::N / 2);
    if constexpr (S::ALIGNED) {
      float4 four = *reinterpret_cast<const float4*>(from);
      v[half][0] = four.x, v[half][1] = four.y, v[half][2] = four.z, v[half][3] = four.w;
    } else {
      for (int j = 0; j < 4; j++) v[half][j] = j < left ? from[j] : 0;
    }
    for (int j = 0; j < 4; j++) v[half][j] += sums[half][j];
  }
  if constexpr (S::GATED) {
    using Out = typename S::Out;
    for (int j = 0; j < 4; j++) v[0][j] = v[0][j] / (1.0f + __expf(-v[0][j])) * v[1][j];
    store_four<S::ALIGNED>(static_cast<Out*>(args.out) + i64(token) * (S::N / 2) + column, v[0], left);
  } else {
    store_four<S::ALIGNED>(y, v[0], left);
  }
}

template <class S, int COUNT> DEVICE void expand(const ExpandArgs& args, int token, u32 members) {
  constexpr int AHEAD = 16;  // columns of B asked for at once
  __shared__ __align__(16) float h[S::HALVES][S::RANK * COUNT];
  __shared__ float squares[COUNT];
  typename S::Place at = S::place(blockIdx.x);
  int tiles = (at.features + TILE - 1) / TILE, feature = at.block * S::FEATURES + threadIdx.x * 4;
  int slot = args.slots[token];
  const f16* tile = args.b + (i64(slot) * S::TILES + at.tile + min(feature / TILE, tiles - 1)) * (S::RANK * TILE);
  const f16* b = tile + feature % TILE;
  constexpr i64 UP = i64(S::TILES / 2) * S::RANK * TILE;  // from a gate's rows to those of its up projection
  uint2 next[S::HALVES][AHEAD];
  auto load = [&](int first) {
#pragma unroll
    for (int half = 0; half < S::HALVES; half++) {
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        bool there = slot >= 0 && first + i < S::RANK;
        next[half][i] = there ? *reinterpret_cast<const uint2*>(b + half * UP + (first + i) * TILE) : make_uint2(0, 0);
      }
    }
  };
  load(0);
  wait_for_previous();

  float sums[COUNT][S::HALVES][4] = {};
  if (slot >= 0) {
    add_shares<S, COUNT>(h, squares, args, token, members, at.part);
    __syncthreads();
    for (int first = 0; first < S::RANK; first += AHEAD) {
#pragma unroll
      for (int half = 0; half < S::HALVES; half++) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
          if (S::RANK % AHEAD != 0 && first + i >= S::RANK) break;
          float2 low = unpack<f16>(next[half][i].x), high = unpack<f16>(next[half][i].y);
#pragma unroll
          for (int c = 0; c < COUNT; c++) {
            float value = h[half][(first + i) * COUNT + c];
            sums[c][half][0] += value * low.x, sums[c][half][1] += value * low.y;
            sums[c][half][2] += value * high.x, sums[c][half][3] += value * high.y;
          }
        }
      }
      load(first + AHEAD);
    }
  }
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    if (c >= __popc(members) || feature >= at.features) continue;
    if (S::NORM && slot >= 0) {
      float factor = rsqrtf(squares[c] / S::K + args.eps);  // 1 / rms(x)
      for (int half = 0; half < S::HALVES; half++) {
        for (int j = 0; j < 4; j++) sums[c][half][j] *= factor;
      }
    }
    store<S>(args, nth_member(members, token, c), at.column + feature, at.features - feature, sums[c]);
  }
  __syncthreads();  // h is that of the next adapter then
}

// Grid: (blocks of FEATURES of each part, with GATED of the first, ceil(n / TOKENS)). Where each token has blocks of its
// own, none computes for others: reading B again, from the second-level cache, takes less time than their products.
template <class S, int TOKENS> DEVICE void expand_tokens(const ExpandArgs& args) {
  let_next_start();
  int end = min((int(blockIdx.y) + 1) * TOKENS, args.n);
  for (int token = blockIdx.y * TOKENS; token < end; token++) {
    if (!S::GATED && args.slots[token] < 0) continue;
    u32 found = TOKENS == 1 ? 1u << token % GROUP : members(args.slots, token, args.n);
    if (__popc(found) == 1) expand<S, 1>(args, token, found);
    if constexpr (TOKENS > 1) {
      if (__popc(found) > 1) expand<S, GROUP>(args, token, found);
    }
  }
  wait_for_previous();  // or the next kernel would take the one before for ended
}

}  // namespace low_rank
