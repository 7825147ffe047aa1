// Stored matrices (mlcgen/formats.py) as a warp reads them: straight from memory into tensor-core fragments.
//
// A warp takes 32 rows by 32 columns at a time, a chunk. Lane (g, t) = (lane / 4, lane % 4) holds four rows, its slots
// 0-3, and of each the columns 8t ... 8t + 7, as 16-byte loads deliver them. Rows and columns of a product may be
// numbered in any order that both operands share, so slots 0 and 1 are rows g and g + 8 of a first 16-row fragment,
// slots 2 and 3 of a second, and the eight columns are spread over two fragments of 16 columns.
//
// load(chunk): what this lane holds of one; prepare(x): a lane's eight activations as the products want them;
// multiply(sum, chunk, x): sum[tile][j] += the products of row tile 0 or 1 with tile j of 8 tokens.
#pragma once
#include "primitives.cuh"

constexpr int CHUNK = 32;  // rows and columns
constexpr int TILE = 16;   // rows of a stored tile

// A block's 32 rows: 32 consecutive ones, or 16 of the gate and the same 16 of the up projection.
template <int N, bool GATED> struct Rows {
  static constexpr int OUT = GATED ? N / 2 : N;       // columns of the result
  static constexpr int OUT_PER_BLOCK = GATED ? 16 : 32;
  // Row of the matrix for row `r` (0-31) of block `block`; beyond the matrix, its last.
  DEVICE static int matrix_row(int block, int r) {
    int row = GATED ? block * 16 + r % 16 + (r / 16) * (N / 2) : block * 32 + r;
    return row < N ? row : N - 1;
  }
  DEVICE static int matrix_tile(int block, int half) {  // stored tile of rows 16 * half ...
    int tile = GATED ? block + half * (N / 2 / TILE) : block * 2 + half;
    constexpr int LAST = (N + TILE - 1) / TILE - 1;
    return tile < LAST ? tile : LAST;
  }
};

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// sum += the products of both row tiles over both column steps; fragment(a, tile, step) makes the operands.
template <class T, int TILES, class Fragment>
DEVICE void multiply_fragments(float (&sum)[2][TILES][4], const uint4 (&x)[TILES], Fragment fragment) {
#pragma unroll
  for (int step = 0; step < 2; step++) {
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      u32 a[4];
      fragment(a, tile, step);
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        u32 b[2] = {word(x[j], 2 * step), word(x[j], 2 * step + 1)};
        mma<T>(sum[tile][j], a, b);
      }
    }
  }
}

// 16-bit floats, row-major (N, K).
template <class T, int N, int K, bool GATED> struct FloatWeights {
  using Operand = T;
  struct Chunk {
    uint4 row[4];
  };
  const T* row[4];

  DEVICE FloatWeights(const void* w, const void*, const void*, int block, int lane) {
    for (int i = 0; i < 4; i++) {
      row[i] = static_cast<const T*>(w) + i64(Rows<N, GATED>::matrix_row(block, slot_row(lane, i))) * K + lane % 4 * 8;
    }
  }
  DEVICE static int slot_row(int lane, int i) { return i * 8 + lane / 4; }

  DEVICE Chunk load(int chunk, int lane) const {
    Chunk c;
    bool inside = K % CHUNK == 0 || chunk * CHUNK + lane % 4 * 8 < K;
#pragma unroll
    for (int i = 0; i < 4; i++) c.row[i] = inside ? load_once(row[i] + chunk * CHUNK) : make_uint4(0, 0, 0, 0);
    return c;
  }
  DEVICE static uint4 prepare(const uint4& x) { return x; }

  template <int TILES> DEVICE static void multiply(float (&sum)[2][TILES][4], const Chunk& c, const uint4 (&x)[TILES]) {
    multiply_fragments<T>(sum, x, [&](u32 (&a)[4], int tile, int step) {
      a[0] = word(c.row[2 * tile], 2 * step);
      a[1] = word(c.row[2 * tile + 1], 2 * step);
      a[2] = word(c.row[2 * tile], 2 * step + 1);
      a[3] = word(c.row[2 * tile + 1], 2 * step + 1);
    });
  }
};

// Codes in groups of GROUP columns with a scale and perhaps a minimum: value = (code - zero) * scale [+ minimum].
// The stored tile holds the 32-bit words of 16 rows side by side, so a 16-byte load takes the words of four rows.
//
// A code becomes a float16 by putting its bits into the mantissa of 1024: 8-bit codes and low nibbles give 1024 + code,
// high nibbles 1024 + 16 * code, whose activations are divided by 16 in turn. Where a group fills a chunk, products are
// of these raw numbers, exact; what is too much is taken off by products of constants with the same activations, and
// the sum is scaled in float32. Smaller groups scale the weights instead.
template <int BITS, int GROUP, bool HAS_MINIMUM, int N, int K, bool GATED> struct GroupWeights {
  using Operand = f16;
  static constexpr bool SCALES_SUMS = GROUP % CHUNK == 0;
  static constexpr int LOADS = BITS / 4;           // 16-byte loads of a chunk
  static constexpr int WORDS = K * BITS / 32;      // words of a row
  static constexpr int ZERO = HAS_MINIMUM ? 0 : 1 << (BITS - 1);
  static constexpr u32 RAW = 0x64006400u;          // 1024 in both halves
  // What the raw numbers of columns of step 0 and 1 exceed the codes by, in units of their activations.
  DEVICE static constexpr float excess(int step) { return 1024.0f + divisor(step) * ZERO; }
  DEVICE static constexpr float divisor(int step) { return BITS == 4 && step == 1 ? 16.0f : 1.0f; }  // of activations
  struct Chunk {
    uint4 codes[LOADS];
    uint2 scale, minimum;  // four rows', of the group that this lane's columns lie in
  };
  const u8* codes;
  const f16* scale;
  const f16* minimum;

  DEVICE GroupWeights(const void* w, const void* scales, const void* minima, int block, int lane) {
    int g = lane / 4;
    i64 tile = Rows<N, GATED>::matrix_tile(block, g / 4);
    codes = static_cast<const u8*>(w) + tile * WORDS * TILE * 4 + g % 4 * 16;
    i64 groups = tile * (K / GROUP) * TILE + g % 4 * 4;
    scale = static_cast<const f16*>(scales) + groups;
    minimum = HAS_MINIMUM ? static_cast<const f16*>(minima) + groups : nullptr;
  }
  DEVICE static int slot_row(int lane, int i) { return lane / 16 * 16 + lane / 4 % 4 * 4 + i; }

  DEVICE Chunk load(int chunk, int lane) const {
    Chunk c;
    int column = chunk * CHUNK + lane % 4 * 8;
    if (K % CHUNK != 0 && column >= K) return zeros();
#pragma unroll
    for (int i = 0; i < LOADS; i++) c.codes[i] = load_once(codes + (column * BITS / 32 + i) * TILE * 4);
    c.scale = *reinterpret_cast<const uint2*>(scale + column / GROUP * TILE);
    c.minimum = HAS_MINIMUM ? *reinterpret_cast<const uint2*>(minimum + column / GROUP * TILE) : make_uint2(0, 0);
    return c;
  }
  DEVICE static Chunk zeros() {
    Chunk c;
    for (int i = 0; i < LOADS; i++) c.codes[i] = make_uint4(0, 0, 0, 0);
    c.scale = c.minimum = make_uint2(0, 0);
    return c;
  }

  // 4 bits: columns in the order 0 2, 1 3, 4 6, 5 7, the last four (high nibbles) divided by 16.
  DEVICE static uint4 prepare(const uint4& x) {
    if constexpr (BITS == 8) return x;
    return make_uint4(pick_bytes(x.x, x.y, 0x5410), pick_bytes(x.x, x.y, 0x7632),
                      divided_by_16(pick_bytes(x.z, x.w, 0x5410)), divided_by_16(pick_bytes(x.z, x.w, 0x7632)));
  }
  DEVICE static u32 divided_by_16(u32 pair) { return fma_pair<f16>(pair, 0x2c002c00u, 0x80008000u); }

  template <int TILES> DEVICE static void multiply(float (&sum)[2][TILES][4], const Chunk& c, const uint4 (&x)[TILES]) {
    if constexpr (SCALES_SUMS) {
      multiply_raw(sum, c, x);
    } else {
      multiply_fragments<f16>(sum, x, [&](u32 (&a)[4], int tile, int step) { scaled_fragment(a, c, tile, step); });
    }
  }

  // Two raw numbers of a slot.
  DEVICE static u32 raw_pair(const Chunk& c, int slot, int step, int half) {
    if constexpr (BITS == 8) return pick_bytes(word(c.codes[step], slot), RAW, half == 0 ? 0x5150 : 0x5352);
    // Byte j: column j low, column 4 + j high; a mask takes bytes 0 and 2, after a shift bytes 1 and 3.
    return and_or(word(c.codes[0], slot) >> (half * 8), step == 0 ? 0x000f000fu : 0x00f000f0u, RAW);
  }

  template <int TILES>
  DEVICE static void multiply_raw(float (&sum)[2][TILES][4], const Chunk& c, const uint4 (&x)[TILES]) {
    float products[2][TILES][4], totals[TILES][2];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      float start[4];
      sum_tokens(start, totals[j], x[j]);
#pragma unroll
      for (int i = 0; i < 4; i++) products[0][j][i] = products[1][j][i] = start[i];
    }
    multiply_fragments<f16>(products, x, [&](u32 (&a)[4], int tile, int step) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = raw_pair(c, 2 * tile + i % 2, step, i / 2);
    });
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      float2 scales = unpack<f16>(tile == 0 ? c.scale.x : c.scale.y);
      float2 minima = unpack<f16>(tile == 0 ? c.minimum.x : c.minimum.y);
#pragma unroll
      for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          sum[tile][j][i] += (i < 2 ? scales.x : scales.y) * products[tile][j][i];
          if (HAS_MINIMUM) sum[tile][j][i] += (i < 2 ? minima.x : minima.y) * totals[j][i % 2];
        }
      }
    }
  }

  // For tokens 2t and 2t + 1: `start`, the excess of the raw products, negative; with minima the activations' totals.
  DEVICE static void sum_tokens(float (&start)[4], float (&totals)[2], const uint4& x) {
    u32 b[2][2] = {{x.x, x.y}, {x.z, x.w}};
    for (int i = 0; i < 4; i++) start[i] = 0;
    if constexpr (!HAS_MINIMUM) {
#pragma unroll
      for (int step = 0; step < 2; step++) {
        u32 v = pack<f16>(-excess(step), -excess(step)), a[4] = {v, v, v, v};
        mma<f16>(start, a, b[step]);
      }
    } else {
      float sums[2][4] = {};
      u32 one = 0x3c003c00u, a[4] = {one, one, one, one};
      mma<f16>(sums[0], a, b[0]);
      mma<f16>(sums[1], a, b[1]);
#pragma unroll
      for (int i = 0; i < 4; i++) start[i] = -excess(0) * sums[0][i] - excess(1) * sums[1][i];
      for (int i = 0; i < 2; i++) totals[i] = sums[0][i] + divisor(1) * sums[1][i];
    }
  }

  // Weights rounded to float16, those of divided activations times 16.
  DEVICE static void scaled_fragment(u32 (&a)[4], const Chunk& c, int tile, int step) {
    u32 over = pack<f16>(excess(step), excess(step));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 selector = i % 2 == 0 ? 0x1010 : 0x3232;
      u32 s = pick_bytes(tile == 0 ? c.scale.x : c.scale.y, 0, selector);
      u32 m = pick_bytes(tile == 0 ? c.minimum.x : c.minimum.y, 0, selector);
      u32 code = subtract_pair_f16(raw_pair(c, 2 * tile + i % 2, step, i / 2), over);
      if (BITS == 4 && step == 1) code = divided_by_16(code);
      a[i] = fma_pair<f16>(code, s, m);
      if (BITS == 4 && step == 1) a[i] = fma_pair<f16>(a[i], 0x4c004c00u, 0x80008000u);
    }
  }
};
