// out (n, N) = x (n, K) W (N, K)^T on Hopper's tensor cores, for any number n of tokens.
//
// The product is computed transposed: a tile of W (64 features for each consumer warp group) is the left operand of
// wgmma and a tile of x (TOKENS tokens) the right one, so that few tokens need only a narrow product. One producer
// warp copies both tiles, 64 values along k at a time, into a ring of STAGES buffers; the consumers multiply.
//
//   full[s]   the copies into buffer s have arrived         producer (and TMA) -> consumers
//   empty[s]  every warp that reads buffer s is done with it  consumers -> producer
//
// A worker is a cluster of SHARE x SPLIT blocks. SHARE blocks have neighbouring features and share a tile of x: each
// copies a part of it to all of them. SPLIT blocks have the same features and share k; each adds up the sums of a part
// of the tokens.
//
// Besides, the first `split_tiles` tiles of the output can be split along k evenly between all workers (a tile's sums
// are added by the worker that has its beginning, always in the same order); the others are computed whole, in turn.
#pragma once
#include "hopper.cuh"

constexpr int BLOCK_K = 64;             // 128 bytes: a row of the 128-byte swizzle
constexpr int ROW_BYTES = 2 * BLOCK_K;
constexpr int GROUP_ROWS = 64;          // rows of W for each consumer: the m of wgmma

// How a kernel cuts the product, and the sizes that follow.
// GATED: rows of W alternate, 8 of a gate and 8 of the matching up projection; 16 rows make 8 features.
template <int TOKENS_, int CONSUMERS_, int SHARE_, int SPLIT_, int STAGES_, bool GATED_> struct Tiling {
  static constexpr int TOKENS = TOKENS_, CONSUMERS = CONSUMERS_, SHARE = SHARE_, SPLIT = SPLIT_, STAGES = STAGES_;
  static constexpr int CLUSTER = SHARE * SPLIT;
  static constexpr bool GATED = GATED_;
  static constexpr int SUMS = TOKENS / 2;                                // f32 accumulators of a consumer thread
  static constexpr bool MOVES_REGISTERS = SUMS > 96;                     // from a whole warp group of producers
  static constexpr int CONSUMER_REGISTERS = 232, PRODUCER_REGISTERS = 40;
  static constexpr int THREADS = (CONSUMERS + 1) * WARP_GROUP - (MOVES_REGISTERS ? 0 : WARP_GROUP - WARP);
  static constexpr int GROUP_FEATURES = GATED ? GROUP_ROWS / 2 : GROUP_ROWS;
  static constexpr int FEATURES = CONSUMERS * GROUP_FEATURES;            // of a block
  static constexpr int SHARED_TOKENS = TOKENS / SHARE;                   // that one block copies for those that share
  static constexpr int W_BYTES = CONSUMERS * GROUP_ROWS * ROW_BYTES;
  static constexpr int X_BYTES = TOKENS * ROW_BYTES;
  static constexpr int STAGE_BYTES = W_BYTES + X_BYTES;
  static constexpr int PART_TOKENS = TOKENS / SPLIT;                     // that a block of those that split k stores
  static constexpr int PART_SUMS = SUMS / SPLIT;
  static constexpr int PART_BYTES = PART_SUMS * WARP_GROUP * sizeof(float);
  static constexpr int SLAB = TOKENS >= 128 ? 32 : PART_TOKENS < 16 ? PART_TOKENS : 16;  // tokens stored together
  static_assert(PART_TOKENS % SLAB == 0 && SLAB % 8 == 0 && SHARED_TOKENS % 8 == 0);
};

// ---- Which products a worker computes --------------------------------------------------------------------------------

// Steps [k_begin, k_end) of BLOCK_K values of one tile.
struct Segment {
  int features, tokens;  // numbers of the tile, in features (of the cluster) and in tokens
  int k_begin, k_end;
};

struct Schedule {
  int feature_tiles, token_tiles, k_steps;
  int worker, workers;
  int part, parts;  // of a whole tile's steps: this block of the cluster computes that part
  int split_tiles;  // the first tiles are split between all workers
  int step, end;    // what is left of this worker's part of them
  int tile;         // its next whole tile

  DEVICE Schedule(int feature_tiles, int token_tiles, int k_steps, int worker, int workers, int part, int parts,
                  int split_tiles)
      : feature_tiles(feature_tiles), token_tiles(token_tiles), k_steps(k_steps), worker(worker), workers(workers),
        part(part), parts(parts), split_tiles(split_tiles), step(first_step(worker)), end(first_step(worker + 1)), tile(split_tiles + worker) {}

  DEVICE int first_step(int w) const {
    int steps = split_tiles * k_steps;
    return w * (steps / workers) + min(w, steps % workers);
  }

  DEVICE bool next(Segment& s) {
    if (step < end) {
      int t = step / k_steps;
      place(s, t);
      s.k_begin = step - t * k_steps;
      s.k_end = min(k_steps, s.k_begin + end - step);
      step += s.k_end - s.k_begin;
      return true;
    }
    if (tile >= feature_tiles * token_tiles) return false;
    place(s, tile);
    s.k_begin = k_steps * part / parts, s.k_end = k_steps * (part + 1) / parts;
    tile += workers;
    return true;
  }

  // Tiles that are computed at the same time should share rows of W and of x in the L2 cache: tokens come in groups of
  // NEAR tiles, and within a group each tile of features meets all of its tokens before the next.
  DEVICE void place(Segment& s, int t) const {
    constexpr int NEAR = 8;
    int group = t / (NEAR * feature_tiles);
    int in_group = t - group * NEAR * feature_tiles;
    int width = min(NEAR, token_tiles - group * NEAR);
    s.features = in_group / width;
    s.tokens = group * NEAR + in_group % width;
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

// ---- Shared memory -----------------------------------------------------------------------------------------------------

template <class Tile, class Staged> struct SharedMemory {
  static constexpr int SLAB_BYTES = Tile::SLAB * Tile::GROUP_FEATURES * sizeof(Staged);
  static constexpr int SLABS_AT = Tile::STAGES * Tile::STAGE_BYTES;
  static constexpr int INBOX_AT = SLABS_AT + Tile::CONSUMERS * 2 * SLAB_BYTES;
  static constexpr int BARRIERS_AT = INBOX_AT + Tile::CONSUMERS * (Tile::SPLIT - 1) * Tile::PART_BYTES;
  static constexpr int BYTES = BARRIERS_AT + (2 * Tile::STAGES + 2 * Tile::CONSUMERS) * sizeof(u64);

  unsigned char* base;

  DEVICE unsigned char* w(int stage) const { return base + stage * Tile::STAGE_BYTES; }
  DEVICE unsigned char* x(int stage) const { return w(stage) + Tile::W_BYTES; }
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
  DEVICE u64* inbox_full(int consumer) const { return full(2 * Tile::STAGES + consumer); }
  DEVICE u64* inbox_read(int consumer) const { return full(2 * Tile::STAGES + Tile::CONSUMERS + consumer); }

  DEVICE void init_barriers() const {
    constexpr int READERS = Tile::SHARE * Tile::CONSUMERS * (WARP_GROUP / WARP);
    for (int s = 0; s < Tile::STAGES; s++) {
      init_barrier(full(s), 1);
      init_barrier(empty(s), READERS);
    }
    for (int c = 0; c < Tile::CONSUMERS; c++) {
      init_barrier(inbox_full(c), 1);
      init_barrier(inbox_read(c), (Tile::SPLIT - 1) * WARP_GROUP);
    }
    publish_barriers();
  }
};

// ---- The producer ------------------------------------------------------------------------------------------------------

// Walks through the steps of a worker's segments.
struct Cursor {
  Schedule schedule;
  Segment at;
  int k;
  bool valid;

  DEVICE explicit Cursor(const Schedule& s) : schedule(s) { next_segment(); }
  DEVICE void next_segment() {
    valid = schedule.next(at);
    k = at.k_begin;
  }
  DEVICE void advance() {
    if (++k == at.k_end) next_segment();
  }
};

template <class Tile, class Shared>
DEVICE void load_w(const Shared& shared, const TensorMap& map, const Cursor& c, int sharer, int stage) {
  arrive_expecting(shared.full(stage), Tile::STAGE_BYTES);
  int feature = (c.at.features * Tile::SHARE + sharer) * Tile::FEATURES;
  if constexpr (Tile::GATED) load_box(shared.w(stage), map, shared.full(stage), c.k * BLOCK_K, 0, 0, feature / 8);
  else load_box(shared.w(stage), map, shared.full(stage), c.k * BLOCK_K, feature);
}

template <class Tile, class Shared>
DEVICE void load_x(const Shared& shared, const TensorMap& map, const Cursor& c, int sharer, int stage) {
  int token = c.at.tokens * Tile::TOKENS + sharer * Tile::SHARED_TOKENS;
  unsigned char* to = shared.x(stage) + sharer * Tile::SHARED_TOKENS * ROW_BYTES;
  if constexpr (Tile::SHARE == 1) {
    load_box(to, map, shared.full(stage), c.k * BLOCK_K, token);
  } else {
    int sharers = ((1 << Tile::SHARE) - 1) << (c.schedule.part * Tile::SHARE);
    load_box_to_all(to, map, shared.full(stage), c.k * BLOCK_K, token, sharers);
  }
}

// One thread. W does not depend on the kernel before this one, so the ring is filled with it while that one ends.
template <class Tile, class Shared>
DEVICE void produce(const Shared& shared, const TensorMap& w, const TensorMap& x, const Schedule& schedule, int sharer) {
  prefetch_map(w);
  prefetch_map(x);
  Cursor ahead(schedule);
  for (int s = 0; s < Tile::STAGES && ahead.valid; s++, ahead.advance()) load_w<Tile>(shared, w, ahead, sharer, s);
  wait_for_previous();

  Ring<Tile::STAGES> ring;
  bool first_pass = true;
  for (Cursor c(schedule); c.valid; c.advance()) {
    wait(shared.empty(ring.stage), ring.parity ^ 1);  // goes on at once in the first pass
    if (!first_pass) load_w<Tile>(shared, w, c, sharer, ring.stage);
    load_x<Tile>(shared, x, c, sharer, ring.stage);
    ring.advance();
    if (ring.stage == 0) first_pass = false;
  }
  // A block may not end while others still arrive at its barriers.
  for (int s = 0; Tile::SHARE > 1 && s < Tile::STAGES; s++, ring.advance())
    wait(shared.empty(ring.stage), ring.parity ^ 1);
}

// ---- The consumers -----------------------------------------------------------------------------------------------------

// Tells the blocks that write to this buffer that this warp has read it.
template <class Tile, class Shared> DEVICE void release(const Shared& shared, int stage, int part) {
  int lane = threadIdx.x % WARP;
  if constexpr (Tile::SHARE == 1) {
    if (lane == 0) arrive(shared.empty(stage));
  } else {
    if (lane < Tile::SHARE) arrive_in_block(shared.empty(stage), part * Tile::SHARE + lane);
  }
}

// sums (64 x TOKENS) = this consumer's rows of W times x, over `steps` buffers of the ring. One step's products run
// while the next step's are issued.
template <class T, class Tile, class Shared>
DEVICE void multiply(float (&sums)[Tile::SUMS], const Shared& shared, Ring<Tile::STAGES>& ring, int steps,
                     int part) {
  int consumer = threadIdx.x / WARP_GROUP;
  int before = 0;
  for (int i = 0; i < steps; i++) {
    wait(shared.full(ring.stage), ring.parity);
    u64 w = swizzled_rows(shared.w(ring.stage) + consumer * GROUP_ROWS * ROW_BYTES);
    u64 x = swizzled_rows(shared.x(ring.stage));
    fence_products();
#pragma unroll
    for (int k = 0; k < BLOCK_K / 16; k++) wgmma<T>(sums, w + 2 * k, x + 2 * k, i > 0 || k > 0);
    commit_products();
    wait_products<1>();
    if (i > 0) release<Tile>(shared, before, part);
    before = ring.stage;
    ring.advance();
  }
  wait_products<0>();
  release<Tile>(shared, before, part);
}

// The sums of part of a tile, for the worker that has its beginning. Each block has room for one tile, in the order of
// registers: partials[block][consumer][4 sums][thread].
template <class Tile> struct Partials {
  float4* sums;
  u32* flags;  // [block][consumer], 0 between kernels

  DEVICE float4* of(int block, int consumer) const {
    return sums + (block * Tile::CONSUMERS + consumer) * (Tile::SUMS / 4 * WARP_GROUP) + threadIdx.x % WARP_GROUP;
  }
  DEVICE void give(const float (&values)[Tile::SUMS], int block, int consumer) const {
    float4* to = of(block, consumer);
#pragma unroll
    for (int i = 0; i < Tile::SUMS; i += 4)
      __stcg(to + i / 4 * WARP_GROUP, make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
    sync_threads(1 + consumer, WARP_GROUP);
    if (threadIdx.x % WARP_GROUP == 0) raise_flag(flags + block * Tile::CONSUMERS + consumer);
  }
  DEVICE void add(float (&values)[Tile::SUMS], int block, int consumer) const {
    u32* flag = flags + block * Tile::CONSUMERS + consumer;
    if (threadIdx.x % WARP_GROUP == 0) await_flag(flag), *flag = 0;
    sync_threads(1 + consumer, WARP_GROUP);
    const float4* from = of(block, consumer);
#pragma unroll
    for (int i = 0; i < Tile::SUMS; i += 4) {
      float4 v = __ldcg(from + i / 4 * WARP_GROUP);
      values[i] += v.x, values[i + 1] += v.y, values[i + 2] += v.z, values[i + 3] += v.w;
    }
  }
};

// Adds what the workers after this one computed of the tile, in their order.
template <class Tile>
DEVICE void add_others(float (&sums)[Tile::SUMS], const Partials<Tile>& partials, const Schedule& schedule, int covered,
                       int rank, int consumer) {
  for (int w = schedule.worker + 1; covered < schedule.k_steps; w++) {
    partials.add(sums, w * Tile::CLUSTER + rank, consumer);
    covered += schedule.first_step(w + 1) - schedule.first_step(w);
  }
}

// Blocks that split k: each gives the others its sums of their parts of the tokens.
template <class Tile, class Shared>
DEVICE void send_sums(const float (&sums)[Tile::SUMS], const Shared& shared, int consumer, int sharer, int part) {
#pragma unroll
  for (int p = 0; p < Tile::SPLIT; p++) {
    if (p == part) continue;
    float4* to = shared.inbox(consumer, p, part);
#pragma unroll
    for (int i = 0; i < Tile::PART_SUMS; i += 4) {
      const float* v = sums + p * Tile::PART_SUMS + i;
      send_to_block(to + i / 4 * WARP_GROUP, make_float4(v[0], v[1], v[2], v[3]), shared.inbox_full(consumer),
                    p * Tile::SHARE + sharer);
    }
  }
}
// Adds what the others sent, in their order, to its own sums of its part.
template <class Tile, class Shared>
DEVICE void receive_sums(float* sums, const Shared& shared, int consumer, int sharer, int part) {
  for (int from = 0; from < Tile::SPLIT; from++) {
    if (from == part) continue;
    const float4* box = shared.inbox(consumer, part, from);
#pragma unroll
    for (int i = 0; i < Tile::PART_SUMS; i += 4) {
      float4 v = box[i / 4 * WARP_GROUP];
      sums[i] += v.x, sums[i + 1] += v.y, sums[i + 2] += v.z, sums[i + 3] += v.w;
    }
    arrive_in_block(shared.inbox_read(consumer), from * Tile::SHARE + sharer);
  }
}

DEVICE float silu(float v) {
  constexpr float LOG2_E = 1.44269504f;
  return __fdividef(v, 1.f + exp2_fast(-LOG2_E * v));
}

template <class Out> struct Output {
  Out* out;               // (n, N)
  const float* bias;      // (N) or null
  const float* residual;  // (n, N), only for kernels with RESIDUAL
  int n, N;
};

// Where a feature of a token lies in a slab [token][feature]. Groups of 8 features are swapped such that a warp, which
// writes 8 features of 8 tokens together, writes to different banks.
template <class Tile, class Staged> DEVICE int slab_index(int token, int feature) {
  constexpr bool ROW_IS_ALL_BANKS = Tile::GROUP_FEATURES * sizeof(Staged) == 128;
  int swap = ROW_IS_ALL_BANKS ? token % 8 : token / 2 % 4;
  return token * Tile::GROUP_FEATURES + (feature / 8 ^ swap) * 8 + feature % 8;
}

// Sums of SLAB tokens, from registers sums[0 ... SLAB / 2) of each thread: with g = lane / 4 and t = lane % 4, those of
// rows 16 warp + g and 8 further, tokens 8j + 2t and the next.
template <class Tile> DEVICE void write_slab(float* slab, const float* sums, const float (&bias)[2]) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
  int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < Tile::SLAB / 4; i++) {
    int token = i / 2 * 8 + 2 * t + i % 2;
    float low = sums[i / 2 * 4 + i % 2], high = sums[i / 2 * 4 + i % 2 + 2];
    if constexpr (Tile::GATED) {
      slab[slab_index<Tile, float>(token, 8 * warp + g)] = silu(low) * high;
    } else {
      slab[slab_index<Tile, float>(token, 16 * warp + g)] = low + bias[0];
      slab[slab_index<Tile, float>(token, 16 * warp + g + 8)] = high + bias[1];
    }
  }
}
template <class Tile, class T> DEVICE void write_slab(T* slab, const float* sums, const float (&bias)[2]) {
  constexpr int COLUMNS = Tile::GATED ? 1 : 2;  // matrices of 8 features in a warp's rows; SLAB / 8 of 8 tokens
  constexpr int MATRICES = Tile::SLAB / 8 * COLUMNS, TOGETHER = MATRICES < 4 ? MATRICES : 4;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
#pragma unroll
  for (int first = 0; first < MATRICES; first += TOGETHER) {
    u32 packed[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const float* v = sums + (first + i) / COLUMNS * 4;
      int high = i % COLUMNS;
      if constexpr (Tile::GATED) packed[i] = pack<T>(silu(v[0]) * v[2], silu(v[1]) * v[3]);
      else packed[i] = pack<T>(v[2 * high] + bias[high], v[2 * high + 1] + bias[high]);
    }
    int matrix = first + lane / 8 % TOGETHER;
    int token = matrix / COLUMNS * 8 + lane % 8, feature = (warp * COLUMNS + matrix % COLUMNS) * 8;
    stmatrix_transposed(packed, slab + slab_index<Tile, T>(token, feature));
  }
}

template <bool FIRST, class A, class B> struct Choose { using type = A; };
template <class A, class B> struct Choose<false, A, B> { using type = B; };

// Some values next to each other, for loads and stores of 16 bytes.
template <class V, int N> struct alignas(N * sizeof(V) < 16 ? N * sizeof(V) : 16) Vector {
  V values[N];
};

// A slab to the rows from `token` and the columns from `feature` of the output.
template <class Tile, bool RESIDUAL, class Staged, class Out>
DEVICE void read_slab(const Staged* slab, const Output<Out>& to, int token, int feature) {
  constexpr int WIDTH = 16 / sizeof(Out);
  constexpr int ROW_THREADS = Tile::GROUP_FEATURES / WIDTH;
  if (feature >= to.N) return;
#pragma unroll
  for (int i = threadIdx.x % WARP_GROUP; i < Tile::SLAB * ROW_THREADS; i += WARP_GROUP) {
    int row = i / ROW_THREADS, column = i % ROW_THREADS * WIDTH;
    if (token + row >= to.n) return;
    auto v = *reinterpret_cast<const Vector<Staged, WIDTH>*>(slab + slab_index<Tile, Staged>(row, column));
    i64 at = i64(token + row) * to.N + feature + column;
    if constexpr (RESIDUAL) {
      auto r = *reinterpret_cast<const Vector<float, WIDTH>*>(to.residual + at);
      for (int j = 0; j < WIDTH; j++) v.values[j] += r.values[j];
    }
    Vector<Out, WIDTH> o;
    if constexpr (sizeof(Out) == sizeof(Staged)) o = reinterpret_cast<const Vector<Out, WIDTH>&>(v);
    else for (int j = 0; j < WIDTH; j++) o.values[j] = from_float<Out>(to_float(v.values[j]));
    *reinterpret_cast<Vector<Out, WIDTH>*>(to.out + at) = o;
  }
}

// The sums of a part of a tile to the output. A slab is written by features and read by tokens; there are two, so one
// barrier between writing and reading is enough. `which` says whose turn it is.
template <class Tile, bool RESIDUAL, class Shared, class Out>
DEVICE void store(const float* sums, const Shared& shared, const Output<Out>& to, int token, int feature, int& which) {
  int consumer = threadIdx.x / WARP_GROUP;
  int row = feature + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
  float bias[2] = {0.f, 0.f};
  if (!Tile::GATED && to.bias && feature < to.N) bias[0] = to.bias[row], bias[1] = to.bias[row + 8];
#pragma unroll
  for (int first = 0; first < Tile::PART_TOKENS; first += Tile::SLAB) {
    if (token + first < to.n) {
      auto* slab = shared.slab(consumer, which);
      write_slab<Tile>(slab, sums + first / 2, bias);
      sync_threads(1 + consumer, WARP_GROUP);
      read_slab<Tile, RESIDUAL>(slab, to, token + first, feature);
      which ^= 1;
    }
  }
}

template <class T, class Tile, bool RESIDUAL, class Shared, class Out>
DEVICE void consume(const Shared& shared, Schedule schedule, const Partials<Tile>& partials, const Output<Out>& to,
                    int sharer) {
  wait_for_previous();
  int consumer = threadIdx.x / WARP_GROUP, part = schedule.part;
  Ring<Tile::STAGES> ring;
  Segment s;
  int which = 0;
  u32 parity = 0;  // of the inbox
  while (schedule.next(s)) {
    float sums[Tile::SUMS];
    multiply<T, Tile>(sums, shared, ring, s.k_end - s.k_begin, part);
    int feature = (s.features * Tile::SHARE + sharer) * Tile::FEATURES + consumer * Tile::GROUP_FEATURES;
    int token = s.tokens * Tile::TOKENS;
    if constexpr (Tile::SPLIT > 1) {
      if (threadIdx.x % WARP_GROUP == 0)
        arrive_expecting(shared.inbox_full(consumer), (Tile::SPLIT - 1) * Tile::PART_BYTES);
      wait(shared.inbox_read(consumer), parity ^ 1);  // the others have read the sums of the tile before
      send_sums<Tile>(sums, shared, consumer, sharer, part);
      wait(shared.inbox_full(consumer), parity);
#pragma unroll
      for (int p = 0; p < Tile::SPLIT; p++) {  // registers are known at compile time, this block's part is not
        if (p != part) continue;
        float* own = sums + p * Tile::PART_SUMS;
        receive_sums<Tile>(own, shared, consumer, sharer, part);
        store<Tile, RESIDUAL>(own, shared, to, token + p * Tile::PART_TOKENS, feature, which);
      }
      parity ^= 1;
    } else if (s.k_begin > 0) {
      partials.give(sums, schedule.worker * Tile::SHARE + sharer, consumer);
    } else {
      add_others<Tile>(sums, partials, schedule, s.k_end, sharer, consumer);
      store<Tile, RESIDUAL>(sums, shared, to, token, feature, which);
    }
  }
  if (Tile::SPLIT > 1) wait(shared.inbox_read(consumer), parity ^ 1);  // others still arrive at this block's barriers
}

// ---- The kernel --------------------------------------------------------------------------------------------------------

// T: f16 or bf16. Out: T or float. N is a multiple of 64, K of 8; K has at least SPLIT steps of 64.
// partials and flags: one tile of f32 sums and CONSUMERS flags for each block, if split_tiles is not 0 (which needs
// SPLIT = 1); flags start as 0 and end as 0.
template <class T, class Out, int TOKENS, int CONSUMERS, int SHARE, int SPLIT, int STAGES, bool GATED, bool RESIDUAL>
__global__ __cluster_dims__(SHARE * SPLIT, 1, 1)
__launch_bounds__(Tiling<TOKENS, CONSUMERS, SHARE, SPLIT, STAGES, GATED>::THREADS, 1)
void gemm_wgmma(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias,
                const float* residual, Out* out, float* partials, u32* flags, int n, int N, int K, int split_tiles) {
  using Tile = Tiling<TOKENS, CONSUMERS, SHARE, SPLIT, STAGES, GATED>;
  using Staged = typename Choose<RESIDUAL, float, Out>::type;
  DYNAMIC_SHARED(dynamic_shared);
  SharedMemory<Tile, Staged> shared{dynamic_shared};
  let_next_start();
  if (threadIdx.x == 0) shared.init_barriers();
  if constexpr (Tile::CLUSTER > 1) sync_cluster();
  else __syncthreads();

  int rank = blockIdx.x % Tile::CLUSTER, sharer = rank % SHARE, part = rank / SHARE;
  constexpr int WORKER_FEATURES = SHARE * Tile::FEATURES;
  Schedule schedule((N + WORKER_FEATURES - 1) / WORKER_FEATURES, (n + TOKENS - 1) / TOKENS,
                    (K + BLOCK_K - 1) / BLOCK_K, blockIdx.x / Tile::CLUSTER, gridDim.x / Tile::CLUSTER, part, SPLIT,
                    split_tiles);
  if (threadIdx.x >= CONSUMERS * WARP_GROUP) {
    if constexpr (Tile::MOVES_REGISTERS) give_registers_back<Tile::PRODUCER_REGISTERS>();
    if (threadIdx.x == CONSUMERS * WARP_GROUP) produce<Tile>(shared, w, x, schedule, sharer);
    sync_warp();
  } else {
    if constexpr (Tile::MOVES_REGISTERS) take_registers<Tile::CONSUMER_REGISTERS>();
    consume<T, Tile, RESIDUAL>(shared, schedule, Partials<Tile>{reinterpret_cast<float4*>(partials), flags},
                               Output<Out>{out, bias, residual, n, N}, sharer);
  }
}
