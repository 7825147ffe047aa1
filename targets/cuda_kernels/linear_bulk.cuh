// out = f(x) W^T for at most 4 tokens on sm_90: as linear_stream.cuh, but weights wait for x in shared memory.
//
// What bounds such a product is how early its weights are asked for. Here each warp has a ring of STAGES segments,
// 32 rows by SEGMENT columns, that bulk copies fill: far more bytes in flight than registers hold. The rings of a block
// take more than half of a multiprocessor's memory, so that none ever has two blocks: the hardware places a block where
// most is free, and would give two to those that the kernel before left empty, and none to others. A block starts, and
// fills its rings, as soon as the kernel before has left its multiprocessor. Blocks stay and take every gridDim.x-th 32
// rows, so a ring goes on to the next rows while the sums of these are stored.
//
// Warps share nothing but x and their sums: a segment belongs to one warp, which waits for it and refills its stage.
#pragma once
#include "linear_stream.cuh"

// How a segment lies in shared memory. copy(): asks for `columns` columns from `column` on of a block's rows; all lanes
// of a warp call it.
template <class Weights, int COLUMNS> struct Segment;

// 16-bit floats: rows, and room between them that puts the same columns of two neighbours into different banks.
template <class T, int N, int K, bool GATED, int COLUMNS> struct Segment<FloatWeights<T, N, K, GATED>, COLUMNS> {
  using Weights = FloatWeights<T, N, K, GATED>;
  static_assert(K % CHUNK == 0 && COLUMNS % (2 * CHUNK) == 0, "whole chunks, rows of whole lines");
  static constexpr int PITCH = COLUMNS * 2 + 64, BYTES = 32 * PITCH;

  DEVICE static void copy(u8* stage, u64* barrier, const LinearArgs& args, int block, int column, int columns,
                          int lane) {
    if (lane == 0) expect_bulk(barrier, 32 * columns * 2);
    const T* row = static_cast<const T*>(args.w) + i64(Rows<N, GATED>::matrix_row(block, lane)) * K;
    copy_bulk(stage + lane * PITCH, row + column, columns * 2, barrier);
  }

  DEVICE static typename Weights::Chunk load(const u8* stage, int chunk, int lane) {
    typename Weights::Chunk c;
    const u8* column = stage + chunk * CHUNK * 2 + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      c.row[i] = *reinterpret_cast<const uint4*>(column + Weights::slot_row(lane, i) * PITCH);
    }
    return c;
  }
};

// Groups: codes of both row tiles, scales of both, minima of both.
template <int BITS, int GROUP, bool HAS_MINIMUM, int N, int K, bool GATED, int COLUMNS>
struct Segment<GroupWeights<BITS, GROUP, HAS_MINIMUM, N, K, GATED>, COLUMNS> {
  using Weights = GroupWeights<BITS, GROUP, HAS_MINIMUM, N, K, GATED>;
  static_assert(K % CHUNK == 0 && COLUMNS % CHUNK == 0 && COLUMNS % GROUP == 0, "whole chunks and groups");
  DEVICE static constexpr int code_bytes(int columns) { return columns * BITS / 8 * TILE; }  // of a tile
  DEVICE static constexpr int scale_bytes(int columns) { return columns / GROUP * TILE * 2; }
  DEVICE static constexpr int bytes(int columns) {
    return 2 * (code_bytes(columns) + (HAS_MINIMUM ? 2 : 1) * scale_bytes(columns));
  }
  static constexpr int SCALES = 2 * code_bytes(COLUMNS), MINIMA = SCALES + 2 * scale_bytes(COLUMNS);
  static constexpr int BYTES = bytes(COLUMNS);

  DEVICE static void copy(u8* stage, u64* barrier, const LinearArgs& args, int block, int column, int columns, int) {
    if (!one_lane()) return;
    expect_bulk(barrier, bytes(columns));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      i64 tile = Rows<N, GATED>::matrix_tile(block, half);
      const u8* codes = static_cast<const u8*>(args.w) + tile * code_bytes(K) + code_bytes(column);
      copy_bulk(stage + half * code_bytes(COLUMNS), codes, code_bytes(columns), barrier);
      i64 group = tile * scale_bytes(K) + scale_bytes(column);
      u8* scales = stage + half * scale_bytes(COLUMNS);
      copy_bulk(scales + SCALES, static_cast<const u8*>(args.scale) + group, scale_bytes(columns), barrier);
      if (!HAS_MINIMUM) continue;
      copy_bulk(scales + MINIMA, static_cast<const u8*>(args.minimum) + group, scale_bytes(columns), barrier);
    }
  }

  DEVICE static typename Weights::Chunk load(const u8* stage, int chunk, int lane) {
    typename Weights::Chunk c;
    int half = lane / 16, rows = lane / 4 % 4, column = chunk * CHUNK + lane % 4 * 8;
    const u8* codes = stage + half * code_bytes(COLUMNS) + rows * 16;
#pragma unroll
    for (int i = 0; i < Weights::LOADS; i++) {
      c.codes[i] = *reinterpret_cast<const uint4*>(codes + (column * BITS / 32 + i) * TILE * 4);
    }
    const u8* group = stage + half * scale_bytes(COLUMNS) + column / GROUP * TILE * 2 + rows * 8;
    c.scale = *reinterpret_cast<const uint2*>(group + SCALES);
    c.minimum = HAS_MINIMUM ? *reinterpret_cast<const uint2*>(group + MINIMA) : make_uint2(0, 0);
    return c;
  }
};

template <class Weights_, class Out_, int N_, int K_, int WARPS_, int SEGMENT_, int STAGES_, bool NORM_, bool GATED_>
struct BulkSpec : StreamSpec<Weights_, Out_, N_, K_, 1, WARPS_, 1, true, NORM_, GATED_> {
  using Stored = Segment<Weights_, SEGMENT_>;
  static constexpr int TOKENS_AT_MOST = 4;
  static constexpr int SEGMENT = SEGMENT_, STAGES = STAGES_;  // columns; segments of a warp's ring
  static constexpr int SEGMENTS = (K_ + SEGMENT - 1) / SEGMENT;
  static constexpr int PER_BLOCK = BulkSpec::Row::OUT_PER_BLOCK;  // rows of the result
  static constexpr int ROW_BLOCKS = (BulkSpec::Row::OUT + PER_BLOCK - 1) / PER_BLOCK;
  static constexpr int RING_BYTES = STAGES * Stored::BYTES;
  DEVICE static int columns(int segment) { return segment < SEGMENTS - 1 ? SEGMENT : K_ - (SEGMENTS - 1) * SEGMENT; }
};

// A warp's segments in the order that it multiplies them: of one block of rows after the other every WARPS-th.
template <class S> struct Ring {
  const LinearArgs& args;
  u8* stages;
  u64* barriers;
  int lane;
  int next_block, next_segment;  // to ask for
  int stage = 0;                 // that is used next,
  u32 parity = 0;                // and its phase

  DEVICE Ring(const LinearArgs& args, u8* stages, u64* barriers, int warp, int lane)
      : args(args), stages(stages), barriers(barriers), lane(lane), next_block(blockIdx.x), next_segment(warp) {
    if (warp >= S::SEGMENTS) next_block = S::ROW_BLOCKS;
    if (lane < S::STAGES) init_bulk_barrier(barriers + lane);
    sync_warp();
    for (int i = 0; i < S::STAGES; i++) fill(i);
    sync_warp();
  }

  DEVICE void fill(int stage) {
    if (next_block >= S::ROW_BLOCKS) return;
    S::Stored::copy(stages + stage * S::Stored::BYTES, barriers + stage, args, next_block, next_segment * S::SEGMENT,
                    S::columns(next_segment), lane);
    next_segment += S::WARPS;
    if (next_segment >= S::SEGMENTS) {
      next_segment %= S::WARPS;
      next_block += gridDim.x;
    }
  }

  DEVICE const u8* wait() const {
    wait_bulk(barriers + stage, parity);
    return stages + stage * S::Stored::BYTES;
  }

  DEVICE void advance() {
    sync_warp();  // all lanes have read the stage
    fill(stage);
    sync_warp();
    if (++stage == S::STAGES) stage = 0, parity ^= 1;
  }
};

// x / rms(x) * weight of all tokens into shared memory, as the products want them (Zhang and Sennrich 2019). The
// weights are read before the kernel that computes x has ended.
template <class S> struct Norm {
  using T = typename S::Weights::Operand;
  static constexpr int VALUES = (S::K / 8 + S::THREADS - 1) / S::THREADS;  // eight columns each, of a thread
  float4 weight[VALUES][2];

  DEVICE explicit Norm(const float* norm) { read(weight, norm); }

  DEVICE static void read(float4 (&v)[VALUES][2], const float* row) {
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      int at = i * S::THREADS + threadIdx.x;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        v[i][j] = at < S::K / 8 ? reinterpret_cast<const float4*>(row)[2 * at + j] : make_float4(0, 0, 0, 0);
      }
    }
  }

  DEVICE void stage(u8* staged, const LinearArgs& args) const {
    __shared__ float squares[S::TOKENS_AT_MOST][S::WARPS];
    for (int token = 0; token < args.n; token++) {
      float4 x[VALUES][2];
      read(x, static_cast<const float*>(args.x) + token * S::K);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < VALUES; i++) sum += square(x[i][0]) + square(x[i][1]);
      sum = warp_sum(sum);
      if (threadIdx.x % WARP == 0) squares[token][threadIdx.x / WARP] = sum;
      __syncthreads();
      sum = 0;
#pragma unroll
      for (int w = 0; w < S::WARPS; w++) sum += squares[token][w];
      float r = rsqrtf(sum / S::K + args.eps);
      uint4* row = reinterpret_cast<uint4*>(staged + token * S::TOKEN_BYTES);
#pragma unroll
      for (int i = 0; i < VALUES; i++) {
        int at = i * S::THREADS + threadIdx.x;
        if (at >= S::K / 8) break;
        uint2 low = scaled(x[i][0], r, weight[i][0]), high = scaled(x[i][1], r, weight[i][1]);
        row[at] = S::Weights::prepare(make_uint4(low.x, low.y, high.x, high.y));
      }
    }
    __syncthreads();
  }

  DEVICE static float square(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }
  DEVICE static uint2 scaled(float4 v, float r, float4 weight) {
    return make_uint2(pack<T>(v.x * r * weight.x, v.y * r * weight.y), pack<T>(v.z * r * weight.z, v.w * r * weight.w));
  }
};

// A thread's result: one of 32 (GATED: 16) rows of `block` for one token. What stands around the product is read while
// the sums are not there yet.
template <class S> struct Result {
  using R = typename S::Row;
  static_assert(S::THREADS >= R::OUT_PER_BLOCK * S::TOKENS_AT_MOST, "a thread for each result");
  int r = threadIdx.x % R::OUT_PER_BLOCK, token = threadIdx.x / R::OUT_PER_BLOCK, row;
  float v = 0, up = 0;

  DEVICE Result(const LinearArgs& args, int block) : row(block * R::OUT_PER_BLOCK + r) {
    if (!exists(args)) return;
    if (args.bias) v = args.bias[row];
    if (args.bias && S::GATED) up = args.bias[S::N / 2 + row];
    if (args.residual) v += args.residual[i64(token) * R::OUT + row];
  }
  DEVICE bool exists(const LinearArgs& args) const { return token < args.n && row < R::OUT; }

  DEVICE void store(const float* sums, const LinearArgs& args) {
    if (!exists(args)) return;
#pragma unroll
    for (int w = 0; w < S::WARPS; w++) {
      v += sums[(w * 32 + r) * S::PITCH + token];
      if (S::GATED) up += sums[(w * 32 + 16 + r) * S::PITCH + token];
    }
    if (S::GATED) v = v / (1.0f + __expf(-v)) * up;
    static_cast<typename S::Out*>(args.out)[i64(token) * R::OUT + row] = from_float<typename S::Out>(v);
  }
};

// Grid: at most ROW_BLOCKS blocks. Shared memory: WARPS * RING_BYTES, twice SUMS floats, n * TOKEN_BYTES.
template <class S> DEVICE void linear_bulk(const LinearArgs& args) {
  DYNAMIC_SHARED(shared);
  __shared__ u64 barriers[S::WARPS * S::STAGES];
  float* sums = reinterpret_cast<float*>(shared + S::WARPS * S::RING_BYTES);
  u8* staged = reinterpret_cast<u8*>(sums + 2 * S::SUMS);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  Ring<S> ring(args, shared + warp * S::RING_BYTES, barriers + warp * S::STAGES, warp, lane);
  if constexpr (S::NORM) {
    Norm<S> norm(args.norm);
    wait_for_previous();
    let_next_start();
    norm.stage(staged, args);
  } else {
    wait_for_previous();
    let_next_start();
    prepare_tokens<S>(staged, args);
  }

  int turn = 0;  // two sets of sums: one is stored while warps that are ahead fill the other
  for (int block = blockIdx.x; block < S::ROW_BLOCKS; block += gridDim.x, turn ^= 1) {
    Result<S> result(args, block);
    float sum[2][1][4] = {};
    for (int segment = warp; segment < S::SEGMENTS; segment += S::WARPS) {
      const u8* stage = ring.wait();
      int chunks = S::columns(segment) / CHUNK;
#pragma unroll 4
      for (int i = 0; i < chunks; i++) {
        uint4 x[1] = {load_x<S>(staged, args, lane / 4, segment * S::SEGMENT + i * CHUNK + lane % 4 * 8)};
        S::Weights::multiply(sum, S::Stored::load(stage, i, lane), x);
      }
      ring.advance();
    }
    put_sums<S>(sums + turn * S::SUMS, sum, warp, lane, args.n);
    __syncthreads();
    result.store(sums + turn * S::SUMS, args);
  }
}
