// What gemm_wgmma.cuh is made of besides its products: how a product is cut into tiles, which of them a worker computes,
// where things lie in shared memory, and the producer that brings them there.
#pragma once
#include "hopper.cuh"

namespace gemm {

constexpr int BLOCK_K = 64;             // 128 bytes: a row of the 128-byte swizzle
constexpr int ROW_BYTES = 2 * BLOCK_K;
constexpr int GROUP_ROWS = 64;          // rows of W for each consumer: the m of wgmma
constexpr int NEAR_TOKENS = 2048;       // tokens whose x stays in the L2 cache while W passes
constexpr int LARGE = 24 << 20;         // bytes of an output that would drive x from the L2 cache

// How the weights are stored: 16-bit values, or the 4-bit codes and scales of mlcgen/formats.py, in tiles of 16 rows.
enum class Weights { DENSE, Q4 };
constexpr int TILE_ROWS = 16, GROUP = 32;                     // GROUP columns share a scale
constexpr int TILE_CODES = TILE_ROWS * BLOCK_K / 2;           // bytes for BLOCK_K columns: [octet][row][4]
constexpr int TILE_SCALES = TILE_ROWS * BLOCK_K / GROUP * 2;  // bytes: [group][row]

// Tokens whose sums one of `split` blocks adds up: 8 or a multiple of 16 that divides the tile's.
constexpr int part_tokens(int tokens, int split) {
  int part = 8;
  while (split > 1 && (tokens % part != 0 || part * split < tokens)) part += part < 16 ? 8 : 16;
  return split > 1 ? part : tokens;
}

// How a kernel cuts the product, and the sizes that follow.
// GATED: rows of W alternate, 8 of a gate and 8 of the matching up projection; 16 rows make 8 features.
template <Weights WEIGHTS_, int TOKENS_, int CONSUMERS_, int SHARE_, int SPLIT_, int DEPTH_, int STAGES_, bool GATED_>
struct Tiling {
  static constexpr int TOKENS = TOKENS_, CONSUMERS = CONSUMERS_, SHARE = SHARE_, SPLIT = SPLIT_, STAGES = STAGES_;
  static constexpr int DEPTH = DEPTH_;                                   // blocks of BLOCK_K columns of a step
  static constexpr int CLUSTER = SHARE * SPLIT;
  static constexpr bool GATED = GATED_;
  static constexpr Weights WEIGHTS = WEIGHTS_;
  static constexpr int SUMS = TOKENS / 2;                                // f32 accumulators of a consumer thread
  static constexpr bool REORDERS = WEIGHTS == Weights::Q4 && TOKENS <= 128;  // x, by three warps beside the producer
  // From a whole warp group of producers to consumers; a thread of each warp group shares 512 registers.
  static constexpr bool MOVES_REGISTERS = SUMS > 96 || (WEIGHTS == Weights::Q4 && SUMS > 32);
  static constexpr int PRODUCER_REGISTERS = REORDERS ? 56 : 40;
  static constexpr int CONSUMER_REGISTERS = (512 - PRODUCER_REGISTERS) / CONSUMERS / 8 * 8;
  static constexpr int REORDERING = WARP_GROUP - WARP;                   // threads of these
  static constexpr int THREADS = CONSUMERS * WARP_GROUP + (MOVES_REGISTERS || REORDERS ? WARP_GROUP : WARP);
  static constexpr int GROUP_FEATURES = GATED ? GROUP_ROWS / 2 : GROUP_ROWS;
  static constexpr int FEATURES = CONSUMERS * GROUP_FEATURES;            // of a block
  static constexpr int SHARED_TOKENS = TOKENS / SHARE;                   // that one block copies for those that share
  static constexpr int TILES = CONSUMERS * GROUP_ROWS / TILE_ROWS;       // of quantized rows
  static constexpr int W_BYTES =
      DEPTH * (WEIGHTS == Weights::Q4 ? TILES * (TILE_CODES + TILE_SCALES) : CONSUMERS * GROUP_ROWS * ROW_BYTES);
  static constexpr int X_BYTES = DEPTH * TOKENS * ROW_BYTES;
  static constexpr int STAGE_BYTES = (X_BYTES + W_BYTES + 1023) / 1024 * 1024;
  static constexpr int PART_TOKENS = part_tokens(TOKENS, SPLIT);         // that a block of those that split k stores,
  static constexpr int RECEIVERS = TOKENS / PART_TOKENS;                 // the first so many of them
  static constexpr int PART_SUMS = PART_TOKENS / 2;
  static constexpr int PART_BYTES = PART_SUMS * WARP_GROUP * sizeof(float);
  static_assert(TOKENS % PART_TOKENS == 0 && SHARED_TOKENS % 8 == 0 && (DEPTH == 1 || REORDERS));
  // Four would wait for registers that the block does not have.
  static_assert(!MOVES_REGISTERS || CONSUMERS == 2 || CONSUMERS == 3);

  // Other blocks that block `part` sends sums to.
  DEVICE static int receivers(int part) { return RECEIVERS - (part < RECEIVERS); }
};

// ---- Which products a worker computes ------------------------------------------------------------------------------

// Of a tile: its numbers in features (of the cluster) and in tokens.
struct Place {
  int features, tokens;
};

struct Schedule {
  int feature_tiles, token_tiles, near;
  int tile, workers;   // the worker's next tile
  int part;            // of those blocks of the cluster that split k
  int k_begin, k_end;  // steps that this block computes of each tile

  DEVICE Schedule(int feature_tiles, int token_tiles, int near, int k_steps, int worker, int workers, int part,
                  int parts)
      : feature_tiles(feature_tiles), token_tiles(token_tiles), near(near), tile(worker), workers(workers), part(part),
        k_begin(k_steps / parts * part + min(part, k_steps % parts)),
        k_end(k_begin + k_steps / parts + (part < k_steps % parts)) {}

  // Tiles that are computed at the same time should share rows of W and of x in the L2 cache: tokens come in groups of
  // `near` tiles, and within a group each tile of features meets all of its tokens before the next.
  DEVICE bool next(Place& at) {
    if (tile >= feature_tiles * token_tiles) return false;
    int group = tile / (near * feature_tiles);
    int in_group = tile - group * near * feature_tiles;
    int width = min(near, token_tiles - group * near);
    at.features = in_group / width;
    at.tokens = group * near + in_group % width;
    tile += workers;
    return true;
  }
};

// The position in the ring of buffers; `parity` is that of the passes over it.
template <int STAGES> struct Ring {
  int stage = 0;
  u32 parity = 0;
  DEVICE void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// ---- Shared memory -------------------------------------------------------------------------------------------------

// Sums pass to the output through slabs of SLAB tokens, as values of type Staged.
template <class Tile, class Staged> constexpr int SLAB =
    Tile::TOKENS == 256 && sizeof(Staged) == 2 ? 64 :
    Tile::TOKENS >= 128 && Tile::SPLIT == 1 ? 32 : Tile::PART_TOKENS < 16 ? Tile::PART_TOKENS : 16;

template <class Tile, class Staged> struct SharedMemory {
  static constexpr int SLAB_BYTES = SLAB<Tile, Staged> * Tile::GROUP_FEATURES * sizeof(Staged);
  static constexpr int SLABS_AT = Tile::STAGES * Tile::STAGE_BYTES;
  static constexpr int INBOX_AT = SLABS_AT + Tile::CONSUMERS * 2 * SLAB_BYTES;
  static constexpr int BARRIERS_AT = INBOX_AT + Tile::CONSUMERS * (Tile::SPLIT - 1) * Tile::PART_BYTES;
  static constexpr int BYTES = BARRIERS_AT + (3 * Tile::STAGES + 2 * Tile::CONSUMERS) * sizeof(u64);

  unsigned char* base;

  DEVICE unsigned char* x(int stage) const { return base + stage * Tile::STAGE_BYTES; }
  DEVICE unsigned char* w(int stage) const { return x(stage) + Tile::X_BYTES; }
  DEVICE unsigned char* scales(int stage) const { return w(stage) + Tile::DEPTH * Tile::TILES * TILE_CODES; }
  DEVICE Staged* slab(int consumer, int which) const {
    return reinterpret_cast<Staged*>(base + SLABS_AT + (2 * consumer + which) * SLAB_BYTES);
  }
  // Sums for block `to` from block `from` of those that split k, for each thread as [4 sums][thread].
  DEVICE float4* inbox(int consumer, int to, int from) const {
    int box = consumer * (Tile::SPLIT - 1) + from - (from > to);
    return reinterpret_cast<float4*>(base + INBOX_AT + box * Tile::PART_BYTES) + threadIdx.x % WARP_GROUP;
  }
  DEVICE u64* full(int stage) const { return reinterpret_cast<u64*>(base + BARRIERS_AT) + stage; }
  DEVICE u64* empty(int stage) const { return full(Tile::STAGES + stage); }
  DEVICE u64* reordered(int stage) const { return full(2 * Tile::STAGES + stage); }
  DEVICE u64* inbox_full(int consumer) const { return full(3 * Tile::STAGES + consumer); }
  DEVICE u64* inbox_read(int consumer) const { return full(3 * Tile::STAGES + Tile::CONSUMERS + consumer); }

  DEVICE void init_barriers(int part) const {
    constexpr int READERS = Tile::SHARE * Tile::CONSUMERS * (WARP_GROUP / WARP);
    for (int s = 0; s < Tile::STAGES; s++) {
      init_barrier(full(s), 1);
      init_barrier(empty(s), READERS);
      if (Tile::REORDERS) init_barrier(reordered(s), Tile::REORDERING / WARP);
    }
    for (int c = 0; Tile::SPLIT > 1 && c < Tile::CONSUMERS; c++) {
      init_barrier(inbox_full(c), 1);
      init_barrier(inbox_read(c), max(1, Tile::receivers(part)) * WARP_GROUP);
    }
    publish_barriers();
  }
};

// ---- The producer --------------------------------------------------------------------------------------------------

// Walks through the steps of a worker's tiles.
struct Cursor {
  Schedule schedule;
  Place at;
  int k;
  bool valid;

  DEVICE explicit Cursor(const Schedule& s) : schedule(s) { next_tile(); }
  DEVICE void next_tile() {
    valid = schedule.next(at);
    k = schedule.k_begin;
  }
  DEVICE void advance() {
    if (++k == schedule.k_end) next_tile();
  }
};

// The host's maps (`scales` only for Weights::Q4), innermost dimension first, strides in bytes; zeros outside. Maps of
// gated weights, of 2 N rows, bring rows of the gate and of the up projection alternately: 8 of each, or 16 with Q4.
//   x             (K, rows)        stride 2K               box (64, SHARED_TOKENS)                swizzle 128 bytes
//   w             (K, N)           stride 2K               box (64, CONSUMERS * 64)               swizzle 128 bytes
//   w, gated      (K, 8, 2, N/8)   strides 2K, 2NK, 16K    box (64, 8, 2, CONSUMERS * 4)          swizzle 128 bytes
//   codes (u32)   (2K, G, N/16)    strides NK/2, 8K        box (128, G, CONSUMERS * 4 / G)        no swizzle; G = 2 for
//   scales (f16)  (K/2, G, N/16)   strides NK/16, K        box (32, G, CONSUMERS * 4 / G)         gated weights, else 1
struct Maps {
  const TensorMap &w, &scales, &x;
};

template <class Tile, class Shared>
DEVICE void load_w(const Shared& shared, const Maps& maps, const Cursor& c, int sharer, int stage) {
  u64* full = shared.full(stage);
  u64 policy = drop_first();
  int feature = (c.at.features * Tile::SHARE + sharer) * Tile::FEATURES;
  arrive_expecting(full, Tile::W_BYTES + Tile::X_BYTES);
  if constexpr (Tile::WEIGHTS == Weights::Q4) {  // 32-bit words of codes, 16-bit scales
    int tile = feature / TILE_ROWS, block = c.k * Tile::DEPTH;
    load_box(shared.w(stage), maps.w, full, policy, block * (TILE_CODES / 4), 0, tile);
    load_box(shared.scales(stage), maps.scales, full, policy, block * (TILE_SCALES / 2), 0, tile);
  } else if constexpr (Tile::GATED) {
    load_box(shared.w(stage), maps.w, full, policy, c.k * BLOCK_K, 0, 0, feature / 8);
  } else {
    load_box(shared.w(stage), maps.w, full, policy, c.k * BLOCK_K, feature);
  }
}

template <class Tile, class Shared>
DEVICE void load_x(const Shared& shared, const Maps& maps, const Cursor& c, int sharer, int stage) {
  int token = c.at.tokens * Tile::TOKENS + sharer * Tile::SHARED_TOKENS;
  unsigned char* to = shared.x(stage) + sharer * Tile::SHARED_TOKENS * ROW_BYTES;
#pragma unroll
  for (int d = 0; d < Tile::DEPTH; d++, to += Tile::TOKENS * ROW_BYTES) {
    int column = (c.k * Tile::DEPTH + d) * BLOCK_K;
    if constexpr (Tile::SHARE == 1) {
      load_box(to, maps.x, shared.full(stage), drop_last(), column, token);
    } else {
      int sharers = ((1 << Tile::SHARE) - 1) << (c.schedule.part * Tile::SHARE);
      load_box_to_all(to, maps.x, shared.full(stage), drop_last(), column, token, sharers);
    }
  }
}

// One thread. W does not depend on the kernel before this one, so the ring is filled with it while that one ends.
template <class Tile, class Shared>
DEVICE void produce(const Shared& shared, const Maps& maps, const Schedule& schedule, int sharer) {
  prefetch_map(maps.w);
  if (Tile::WEIGHTS == Weights::Q4) prefetch_map(maps.scales);
  prefetch_map(maps.x);
  Cursor ahead(schedule);
  for (int s = 0; s < Tile::STAGES && ahead.valid; s++, ahead.advance()) load_w<Tile>(shared, maps, ahead, sharer, s);
  wait_for_previous();

  Ring<Tile::STAGES> ring;
  bool first_pass = true;
  for (Cursor c(schedule); c.valid; c.advance()) {
    wait(shared.empty(ring.stage), ring.parity ^ 1);  // goes on at once in the first pass
    if (!first_pass) load_w<Tile>(shared, maps, c, sharer, ring.stage);
    load_x<Tile>(shared, maps, c, sharer, ring.stage);
    ring.advance();
    if (ring.stage == 0) first_pass = false;
  }
  // A block may not end while others still arrive at its barriers.
  for (int s = 0; Tile::SHARE > 1 && s < Tile::STAGES; s++, ring.advance())
    wait(shared.empty(ring.stage), ring.parity ^ 1);
}

}  // namespace gemm
