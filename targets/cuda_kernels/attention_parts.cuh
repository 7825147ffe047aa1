// What decode and prefill attention share: the paged cache, tiles of it in shared memory, softmax one tile at a time.
//
// A warp holds blocks of 16 query rows. For each tile of keys it computes
//   scores = queries x keys^T;  weights = 2^(scaled scores - largest so far);  out = out * shrink + weights x values
// with every matrix in registers but the tiles. A lane holds rows g = lane / 4 and g + 8 of each block ("halves" 0
// and 1) and columns 2t, 2t + 1 (t = lane % 4) of every 8: the layout of mma's result, and of its left operand.
#pragma once
#include "primitives.cuh"

// The constants of one attention layer. GROUP query heads share one of the KV heads; a page holds PAGE tokens;
// WINDOW: how many keys a query sees, itself included (0: all before it); CAPPED: logits pass cap * tanh(x / cap).
template <class Number_, class Activation_, int KV_, int GROUP_, int D_, int PAGE_, int WINDOW_ = 0,
          bool CAPPED_ = false>
struct AttentionLayer {
  using Number = Number_;          // of the cache, and of the products
  using Activation = Activation_;  // of queries and outputs
  static constexpr int KV = KV_, GROUP = GROUP_, HEADS = KV_ * GROUP_, D = D_, PAGE = PAGE_, WINDOW = WINDOW_;
  static constexpr bool CAPPED = CAPPED_;
  static_assert(D % 32 == 0, "tiles are permuted in units of 4 chunks of 8 values");
};

// Below any real logit, and a masked score below that. Both finite: a row whose first tiles are masked as a whole
// would see inf - inf otherwise.
constexpr float NO_LOGIT = -1e30f;
constexpr float MASKED = -3e38f;
constexpr float LOG2_E = 1.4426950408889634f;

// ---- the cache ----

// The pages (num_pages, 2, KV, PAGE, D) of one sequence, as one key/value head sees them.
template <class A> struct PagedCache {
  const typename A::Number* pages;  // moved to the head
  const i32* table;                 // page numbers of the sequence

  // The number of the page of token `key`; tokens from `end` on have none.
  DEVICE int page_number(int key, int end) const { return key < end ? table[u32(key) / A::PAGE] : 0; }
  // Where in `pages` the D values of token `key`, which lies in page `number`, begin; its value is VALUES after its key.
  DEVICE static i64 key_at(int number, int key) {
    return (i64(number) * (2 * A::KV * A::PAGE) + u32(key) % A::PAGE) * A::D;
  }
  static constexpr int VALUES = A::KV * A::PAGE * A::D;
  DEVICE const typename A::Number* key_row(int number, int key) const { return pages + key_at(number, key); }
  DEVICE const typename A::Number* value_row(int number, int key) const { return key_row(number, key) + VALUES; }
};

template <class A>
DEVICE PagedCache<A> paged_cache(const typename A::Number* pages, int head, const i32* tables, int table_stride,
                                 int s) {
  return {pages + i64(head) * (A::PAGE * A::D), tables + i64(s) * table_stride};
}

// A tile of KEYS tokens touches this many pages.
template <class A, int KEYS> constexpr int PAGES_OF_TILE = A::PAGE < KEYS ? KEYS / A::PAGE : 1;

// ---- tiles in shared memory ----

// The 16 bytes of columns 8 chunk .. 8 chunk + 7 of a row. Chunks are permuted within a row so that the same chunk of
// 8 consecutive rows, which is what ldmatrix reads at a time, lies in 8 different groups of banks.
template <int D, class T> DEVICE T* chunk_at(T* tile, int row, int chunk) {
  int permuted = chunk ^ (D % 64 == 0 ? row & 7 : row >> 1 & 3);
  return tile + row * D + permuted * 8;
}

// The four 8x8 matrices of a 16x16 square of a tile, in the order of a left operand of mma: rows, then columns.
template <int D, class T> DEVICE const T* square_by_rows(const T* tile, int row, int column, int lane) {
  return chunk_at<D>(tile, row + (lane & 15), column / 8 + (lane >> 4));
}
// The same with columns first.
template <int D, class T> DEVICE const T* square_by_columns(const T* tile, int row, int column, int lane) {
  return chunk_at<D>(tile, row + (lane & 7) + (lane >> 4) * 8, column / 8 + (lane >> 3 & 1));
}

// Starts the copy of the keys and values of tokens first_key .. first_key + KEYS - 1 by THREADS threads; tokens outside
// begin .. end - 1 become zeros. number_of(token of the tile) gives its page.
template <class A, int KEYS, int THREADS, class NumberOf>
DEVICE void copy_tile(typename A::Number* keys, typename A::Number* values, const PagedCache<A>& cache, int first_key,
                      int begin, int end, int thread, NumberOf number_of) {
  constexpr int CHUNKS = A::D / 8;
  static_assert(KEYS * CHUNKS % THREADS == 0, "each thread copies as many chunks");
#pragma unroll
  for (int i = 0; i < KEYS * CHUNKS / THREADS; i++) {
    u32 which = i * THREADS + thread;
    int row = which / CHUNKS, chunk = which % CHUNKS;
    int key = first_key + row, number = number_of(row);
    bool valid = key >= begin && key < end;
    copy_async(chunk_at<A::D>(keys, row, chunk), cache.key_row(number, key) + chunk * 8, valid);
    copy_async(chunk_at<A::D>(values, row, chunk), cache.value_row(number, key) + chunk * 8, valid);
  }
}

// ---- products ----

// Query rows as left operands of mma, kept in registers.
template <int D, int BLOCKS> struct QueryFragments {
  u32 values[BLOCKS][D / 16][4];
  DEVICE void load(u32 (&a)[4], int block, int step) const {
    for (int i = 0; i < 4; i++) a[i] = values[block][step][i];
  }
};

// Query rows read from a tile in shared memory at each use, where they would take too many registers.
template <class T, int D> struct QueryTile {
  const T* rows;  // of the warp
  int lane;
  DEVICE void load(u32 (&a)[4], int block, int step) const {
    ldmatrix(a, square_by_rows<D>(rows, block * 16, step * 16, lane));
  }
};

template <int D, int BLOCKS, class T> DEVICE QueryFragments<D, BLOCKS> to_registers(const QueryTile<T, D>& tile) {
  QueryFragments<D, BLOCKS> q;
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int step = 0; step < D / 16; step++) tile.load(q.values[block][step], block, step);
  return q;
}

// scores = queries x keys^T
template <int D, int KEYS, int BLOCKS, class T, class Queries>
DEVICE void multiply_keys(float (&scores)[BLOCKS][KEYS / 8][4], const Queries& queries, const T* keys, int lane) {
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
      for (int i = 0; i < 4; i++) scores[block][n][i] = 0;
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    u32 query[BLOCKS][4];
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) queries.load(query[block], block, step);
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) {
      u32 k[4];
      ldmatrix(k, square_by_columns<D>(keys, n * 16, step * 16, lane));
      const u32 left[2] = {k[0], k[1]}, right[2] = {k[2], k[3]};
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        mma<T>(scores[block][2 * n], query[block], left);
        mma<T>(scores[block][2 * n + 1], query[block], right);
      }
    }
  }
}

// out += weights x values
template <int D, int KEYS, int BLOCKS, class T>
DEVICE void multiply_values(float (&out)[BLOCKS][D / 8][4], const float (&weights)[BLOCKS][KEYS / 8][4],
                            const T* values, int lane) {
#pragma unroll
  for (int step = 0; step < KEYS / 16; step++) {
    u32 w[BLOCKS][4];
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float(&two)[4] = weights[block][2 * step + i / 2];
        w[block][i] = pack<T>(two[i % 2 * 2], two[i % 2 * 2 + 1]);
      }
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      u32 v[4];
      ldmatrix_transposed(v, square_by_rows<D>(values, step * 16, n * 16, lane));
      const u32 left[2] = {v[0], v[1]}, right[2] = {v[2], v[3]};
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        mma<T>(out[block][2 * n], w[block], left);
        mma<T>(out[block][2 * n + 1], w[block], right);
      }
    }
  }
}

// ---- softmax, one tile at a time ----

// The state of BLOCKS * 16 rows after some tiles. `total` covers only the columns of this lane, until the end.
template <int D, int BLOCKS> struct Softmax {
  float out[BLOCKS][D / 8][4];
  float largest[BLOCKS][2], total[BLOCKS][2];

  DEVICE void clear() {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        for (int i = 0; i < 4; i++) out[block][n][i] = 0;
      for (int half = 0; half < 2; half++) largest[block][half] = NO_LOGIT, total[block][half] = 0;
    }
  }
};

// Of the four lanes that share a row.
DEVICE float row_max(float v) {
  v = fmaxf(v, shuffle_xor(v, 1));
  return fmaxf(v, shuffle_xor(v, 2));
}
DEVICE float row_sum(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}

DEVICE float tanh_fast(float x) { return 1 - 2 / (exp2_fast(x * (2 * LOG2_E)) + 1); }

// How scores become exponents of 2: factor * score, or factor * tanh(inner * score).
struct Logits {
  float factor, inner;
};
template <class A> DEVICE Logits logits(float scale, float cap) {
  if constexpr (A::CAPPED) return {cap * LOG2_E, scale / cap};
  return {scale * LOG2_E, 1};
}

// Bounds of the scores, if the layer has them; before any mask.
template <class A, int TILES, int BLOCKS> DEVICE void cap_scores(float (&scores)[BLOCKS][TILES][4], const Logits& l) {
  if constexpr (A::CAPPED) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
        for (int i = 0; i < 4; i++) scores[block][n][i] = tanh_fast(scores[block][n][i] * l.inner);
  }
}

// Weights may reach 2^SLACK before the state is put in terms of a larger logit: the products with all of `out` that
// this takes are then rare, and such weights still fit in f16.
constexpr float SLACK = 8;

// Puts the state in terms of the largest logits so far, a tile's included, if some row of the warp needs it. ALWAYS:
// without asking, for kernels that wait for memory anyway; the branch costs registers.
template <bool ALWAYS, int D, int TILES, int BLOCKS>
DEVICE void raise_largest(Softmax<D, BLOCKS>& state, const float (&scores)[BLOCKS][TILES][4], float factor) {
  float largest[BLOCKS][2];
  bool needed = false;
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float most = MASKED;
#pragma unroll
      for (int n = 0; n < TILES; n++)
        most = fmaxf(most, fmaxf(scores[block][n][2 * half], scores[block][n][2 * half + 1]));
      largest[block][half] = row_max(most) * factor;
      needed |= largest[block][half] > state.largest[block][half] + SLACK;
    }
  if (!ALWAYS && !any_lane(needed)) return;
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float before = state.largest[block][half], now = fmaxf(before, largest[block][half]);
      float shrink = exp2_fast(before - now);
      state.largest[block][half] = now;
      state.total[block][half] *= shrink;
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        for (int i = 2 * half; i < 2 * half + 2; i++) state.out[block][n][i] *= shrink;
    }
}

// Turns the scores of a tile into weights relative to the largest logit so far (up to SLACK).
template <bool ALWAYS, int D, int TILES, int BLOCKS>
DEVICE void scores_to_weights(Softmax<D, BLOCKS>& state, float (&scores)[BLOCKS][TILES][4], float factor) {
  raise_largest<ALWAYS>(state, scores, factor);
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int n = 0; n < TILES; n++)
      for (int i = 0; i < 4; i++) {
        float weight = exp2_fast(fmaf(scores[block][n][i], factor, -state.largest[block][i / 2]));
        scores[block][n][i] = weight;
        state.total[block][i / 2] += weight;
      }
}
