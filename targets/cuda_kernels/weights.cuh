// Stored matrices (mlcgen/formats.py) as a warp reads them: straight from memory into tensor-core fragments.
//
// A warp takes 32 rows by 32 columns at a time, a chunk. Lane (g, t) = (lane / 4, lane % 4) holds four rows, its slots
// 0-3, and of each the columns 8t ... 8t + 7, as 16-byte loads deliver them. Rows and columns of a product may be
// numbered in any order that both operands share, so slots 0 and 1 are rows g and g + 8 of a first 16-row fragment,
// slots 2 and 3 of a second, and the eight columns are spread over two fragments of 16 columns.
//
// Chunk load(row_of_slot..., column): one chunk; fragment(a, chunk, tile, step): operand `a` of mma for row tile 0 or 1
// and column step 0 or 1; order(x): the eight activations of a lane in the same order of columns.
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
  DEVICE static void fragment(u32 (&a)[4], const Chunk& c, int tile, int step) {
    a[0] = word(c.row[2 * tile], 2 * step);
    a[1] = word(c.row[2 * tile + 1], 2 * step);
    a[2] = word(c.row[2 * tile], 2 * step + 1);
    a[3] = word(c.row[2 * tile + 1], 2 * step + 1);
  }
  DEVICE static uint4 order(const uint4& x) { return x; }
};

// Codes in groups of GROUP columns with a scale and perhaps a minimum: value = (code - zero) * scale [+ minimum].
// The stored tile holds the 32-bit words of 16 rows side by side, so a 16-byte load takes the words of four rows.
template <int BITS, int GROUP, bool HAS_MINIMUM, int N, int K, bool GATED> struct GroupWeights {
  using Operand = f16;
  static constexpr int LOADS = BITS / 4;                         // 16-byte loads of a chunk
  static constexpr int WORDS = K * BITS / 32;                    // words of a row
  static constexpr u32 OFFSET = 0x64006400u;                     // 1024 in both halves: 1024 + code has the code's bits
  static constexpr u32 ZERO = BITS == 4 ? (HAS_MINIMUM ? 0x64006400u : 0x64086408u)   // 1024 + zero point
                                        : (HAS_MINIMUM ? 0x64006400u : 0x64806480u);
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
    for (int i = 0; i < LOADS; i++) c.codes[i] = load_once(codes + i64(column * BITS / 32 + i) * TILE * 4);
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

  DEVICE static void fragment(u32 (&a)[4], const Chunk& c, int tile, int step) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 scales = tile == 0 ? c.scale.x : c.scale.y, minima = tile == 0 ? c.minimum.x : c.minimum.y;
      u32 s = pick_bytes(scales, 0, i == 0 ? 0x1010 : 0x3232), m = pick_bytes(minima, 0, i == 0 ? 0x1010 : 0x3232);
      a[i] = fma_pair<f16>(codes_pair(c, 2 * tile + i, step, 0), s, m);
      a[i + 2] = fma_pair<f16>(codes_pair(c, 2 * tile + i, step, 1), s, m);
    }
  }
  // Two codes of a slot, less the zero point, as halves: exact.
  DEVICE static u32 codes_pair(const Chunk& c, int slot, int step, int half) {
    if constexpr (BITS == 4) {  // byte j: column j low, column 4 + j high; a mask takes bytes 0 and 2
      u32 w = word(c.codes[0], slot) >> (half * 8 + step * 4);
      return subtract_pair_f16((w & 0x000f000fu) | OFFSET, ZERO);
    } else {
      u32 w = word(c.codes[step], slot);
      return subtract_pair_f16(pick_bytes(w, OFFSET, half == 0 ? 0x5150 : 0x5352), ZERO);
    }
  }
  // 4 bits: columns in the order 0 2, 1 3, 4 6, 5 7.
  DEVICE static uint4 order(const uint4& x) {
    if constexpr (BITS == 4) {
      return make_uint4(pick_bytes(x.x, x.y, 0x5410), pick_bytes(x.x, x.y, 0x7632), pick_bytes(x.z, x.w, 0x5410),
                        pick_bytes(x.z, x.w, 0x7632));
    } else {
      return x;
    }
  }
};
