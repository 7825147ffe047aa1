// out (n, N) = x (n, K) W (N, K)^T on Hopper's tensor cores, for any number n of tokens.
//
// The product is computed transposed: a tile of W (64 features for each consumer warp group) is the left operand of
// wgmma and a tile of x (TOKENS tokens) the right one, so that few tokens need only a narrow product. One producer
// warp copies both tiles, DEPTH blocks of 64 values along k at a time, into a ring of STAGES buffers; the consumers
// multiply.
//
//   full[s]       the copies into buffer s have arrived           producer (and TMA) -> consumers
//   reordered[s]  x there has the order of columns that codes have  other warps of the producer's group -> consumers
//   empty[s]      every warp that reads buffer s is done with it  consumers -> producer
//
// A worker is a cluster of SHARE x SPLIT blocks. SHARE blocks have neighbouring features and share a tile of x: each
// copies a part of it to all of them. SPLIT blocks have the same features and share k; each adds up the sums of a part
// of the tokens, or where these are few the first blocks do.
#pragma once
#include "gemm_tiles.cuh"

namespace gemm {

// ---- The consumers -------------------------------------------------------------------------------------------------

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
    const unsigned char *w = shared.w(ring.stage) + consumer * GROUP_ROWS * ROW_BYTES, *x = shared.x(ring.stage);
    fence_products();
#pragma unroll
    for (int k = 0; k < BLOCK_K / 16; k++)
      wgmma<T>(sums, swizzled_rows(w, k), swizzled_rows(x, k), i > 0 || k > 0);
    commit_products();
    wait_products<1>();
    if (i > 0) release<Tile>(shared, before, part);
    before = ring.stage;
    ring.advance();
  }
  wait_products<0>();
  release<Tile>(shared, before, part);
}

// Where this lane finds codes and scales of its rows: row g and 8 further, and of these an octet of columns in a word.
// Fragments want columns 2t and 2t + 1 of each octet; where x is reordered, a lane takes all of every fourth octet.
template <class Tile> struct CodePlace {
  // Gated, two warps share a tile of the gate and the next tile, of the up projection.
  static constexpr int HIGH_CODES = Tile::GATED ? Tile::DEPTH * TILE_CODES : 8 * 4;
  static constexpr int HIGH_SCALES = Tile::GATED ? Tile::DEPTH * TILE_SCALES : 8 * 2;
  int codes, scales;  // bytes to the lower row, from which the other is HIGH_CODES and HIGH_SCALES further
  int t = threadIdx.x % 4;

  DEVICE CodePlace() {
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
    int tile = Tile::GATED ? warp / 2 * 2 : warp, row = Tile::GATED ? warp % 2 * 8 + g : g;
    codes = tile * Tile::DEPTH * TILE_CODES + row * 4;
    scales = tile * Tile::DEPTH * TILE_SCALES + row * 2;
  }
  DEVICE u32 scale(const unsigned char* of, int group, int high) const {
    u32 s = *reinterpret_cast<const u16*>(of + scales + group * TILE_ROWS * 2 + high * HIGH_SCALES);
    return pick_bytes(s, s, 0x1010);
  }
  // The codes of two columns, in the low nibbles of bytes 0 and 2: columns 8 half + 2t and the next of fragment k, or
  // whatever stands there in the order of reorder().
  DEVICE u32 pair(const unsigned char* of, int k, int half, int high) const {
    int octet = Tile::REORDERS ? k / 2 * 4 + t : 2 * k + half;
    u32 word = *reinterpret_cast<const u32*>(of + codes + octet * TILE_ROWS * 4 + high * HIGH_CODES);
    int number = Tile::REORDERS ? k % 2 * 2 + half : t;  // of the octet's pairs; bytes hold columns j and j + 4
    return pick_bytes(word, 0, number % 2 ? 0x4342 : 0x4140) >> number / 2 * 4;
  }
};

// The values of two codes as float16: 1024 + code is exact, so is code - 8.
DEVICE u32 dequantize(u32 pair, u32 scales) {
  u32 codes = fma_pair<f16>(and_or(pair, 0x000f000fu, 0x64006400u), 0x3c003c00u, 0xe408e408u);
  return fma_pair<f16>(codes, scales, 0x80008000u);
}

using Fragments = u32[BLOCK_K / 16][4];  // this lane's part of a block of the left operand

template <class Tile, class Shared>
DEVICE void decode(Fragments& a, const CodePlace<Tile>& place, const Shared& shared, int stage, int block) {
  const unsigned char* codes = shared.w(stage) + block * TILE_CODES;
  const unsigned char* scales = shared.scales(stage) + block * TILE_SCALES;
#pragma unroll
  for (int k = 0; k < BLOCK_K / 16; k++) {
#pragma unroll
    for (int high = 0; high < 2; high++) {
      u32 scale = place.scale(scales, 16 * k / GROUP, high);
#pragma unroll
      for (int half = 0; half < 2; half++) a[k][2 * half + high] = dequantize(place.pair(codes, k, half, high), scale);
    }
  }
}

template <class T, class Tile>
DEVICE void start_products(float (&sums)[Tile::SUMS], const Fragments& a, const unsigned char* x, bool accumulate) {
  fence_products();
#pragma unroll
  for (int k = 0; k < BLOCK_K / 16; k++) wgmma<T>(sums, a[k], swizzled_rows(x, k), accumulate || k > 0);
  commit_products();
}

// Like multiply(), with the left operand made in registers; the other consumer's products run meanwhile.
template <class T, class Tile, class Shared>
DEVICE void multiply_codes(float (&sums)[Tile::SUMS], const Shared& shared, Ring<Tile::STAGES>& ring, int steps,
                           int part) {
  CodePlace<Tile> place;
  for (int i = 0; i < steps; i++) {
    wait(shared.full(ring.stage), ring.parity);
    Fragments a;
    decode<Tile>(a, place, shared, ring.stage, 0);
    start_products<T, Tile>(sums, a, shared.x(ring.stage), i > 0);
    wait_products<0>();
    release<Tile>(shared, ring.stage, part);
    ring.advance();
  }
}

// The same for few tokens, whose products are short: a block's operand is made while the block before is multiplied.
template <class T, class Tile, class Shared>
DEVICE void multiply_codes_ahead(float (&sums)[Tile::SUMS], const Shared& shared, Ring<Tile::STAGES>& ring, int steps,
                                 int part) {
  CodePlace<Tile> place;
  Fragments even, odd;
  int before = -1, blocks = steps * Tile::DEPTH;
  wait(shared.full(ring.stage), ring.parity);
  decode<Tile>(even, place, shared, ring.stage, 0);
  auto multiply = [&](Fragments& now, Fragments& next, int i, int block) {
    if (block == 0) wait(shared.reordered(ring.stage), ring.parity);
    start_products<T, Tile>(sums, now, shared.x(ring.stage) + block * Tile::TOKENS * ROW_BYTES, i > 0);
    wait_products<1>();
    if (block == 0) {
      if (i > 0) release<Tile>(shared, before, part);
      before = ring.stage;
    }
    if (i + 1 == blocks) return;
    if (block == Tile::DEPTH - 1) {
      ring.advance();
      wait(shared.full(ring.stage), ring.parity);
    }
    decode<Tile>(next, place, shared, ring.stage, (block + 1) % Tile::DEPTH);
  };
  for (int i = 0; i < blocks; i += 2) {
    multiply(even, odd, i, 0);
    if (Tile::DEPTH > 1 || i + 1 < blocks) multiply(odd, even, i + 1, Tile::DEPTH - 1);
  }
  ring.advance();
  wait_products<0>();
  release<Tile>(shared, before, part);
}

// Puts the columns of x in the order in which lanes have codes: of the four pairs of a group's four octets first the
// first of each, then the second ones, and so on.
template <class Tile, class Shared> DEVICE void reorder(const Shared& shared, const Schedule& schedule, int thread) {
  Ring<Tile::STAGES> ring;
  for (Cursor c(schedule); c.valid; c.advance()) {
    wait(shared.full(ring.stage), ring.parity);
#pragma unroll
    for (int i = thread; i < Tile::DEPTH * Tile::TOKENS * (BLOCK_K / GROUP); i += Tile::REORDERING) {
      int token = i % (Tile::DEPTH * Tile::TOKENS), group = i / (Tile::DEPTH * Tile::TOKENS);
      uint4* row = reinterpret_cast<uint4*>(shared.x(ring.stage) + token * ROW_BYTES);  // one block after the other
      uint4 v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = row[(4 * group + j) ^ token % 8];  // the swizzle of 128 bytes
      row[(4 * group) ^ token % 8] = make_uint4(v[0].x, v[1].x, v[2].x, v[3].x);
      row[(4 * group + 1) ^ token % 8] = make_uint4(v[0].y, v[1].y, v[2].y, v[3].y);
      row[(4 * group + 2) ^ token % 8] = make_uint4(v[0].z, v[1].z, v[2].z, v[3].z);
      row[(4 * group + 3) ^ token % 8] = make_uint4(v[0].w, v[1].w, v[2].w, v[3].w);
    }
    publish_to_products();
    sync_warp();
    if (thread % WARP == 0) arrive(shared.reordered(ring.stage));
    ring.advance();
  }
}

// Blocks that split k: each gives the others its sums of their parts of the tokens.
template <class Tile, class Shared>
DEVICE void send_sums(const float (&sums)[Tile::SUMS], const Shared& shared, int consumer, int sharer, int part) {
#pragma unroll
  for (int p = 0; p < Tile::RECEIVERS; p++) {
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
  const float* residual;  // (n, N) or null
  int n, N;
  bool is_large;          // compared with the L2 cache

  DEVICE Output(Out* out, const float* bias, const float* residual, int n, int N)
      : out(out), bias(bias), residual(residual), n(n), N(N), is_large(i64(n) * N * sizeof(Out) > LARGE) {}
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
  for (int i = 0; i < SLAB<Tile, float> / 4; i++) {
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
  constexpr int MATRICES = SLAB<Tile, T> / 8 * COLUMNS, TOGETHER = MATRICES < 4 ? MATRICES : 4;
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

// A thread's part of a slab as it is read: VECTORS times WIDTH features of a token.
template <class Tile, class Staged, class Out> struct SlabPart {
  static constexpr int WIDTH = 16 / sizeof(Out);
  static constexpr int ROW_THREADS = Tile::GROUP_FEATURES / WIDTH;
  static constexpr int ROWS = SLAB<Tile, Staged>;
  static constexpr int VECTORS = (ROWS * ROW_THREADS + WARP_GROUP - 1) / WARP_GROUP;
  using Values = Vector<float, WIDTH>[VECTORS];

  DEVICE static int row(int i) { return (i * WARP_GROUP + threadIdx.x % WARP_GROUP) / ROW_THREADS; }
  DEVICE static int column() { return threadIdx.x % ROW_THREADS * WIDTH; }
  DEVICE static bool is_inside(const Output<Out>& to, int i, int token, int feature) {
    return row(i) < ROWS && token + row(i) < to.n && feature < to.N;
  }
  DEVICE static i64 place(const Output<Out>& to, int i, int token, int feature) {
    return i64(token + row(i)) * to.N + feature + column();
  }
};

template <class Part, class Out>
DEVICE void load_residual(typename Part::Values& values, const Output<Out>& to, int token, int feature) {
#pragma unroll
  for (int i = 0; i < Part::VECTORS; i++) {
    values[i] = {};
    if (!to.residual || !Part::is_inside(to, i, token, feature)) continue;
    const float* from = to.residual + Part::place(to, i, token, feature);
    values[i] = *reinterpret_cast<const Vector<float, Part::WIDTH>*>(from);
  }
}

// A slab to the rows from `token` and the columns from `feature` of the output.
template <class Tile, class Part, class Staged, class Out>
DEVICE void read_slab(const Staged* slab, const typename Part::Values& residual, const Output<Out>& to, int token,
                      int feature) {
#pragma unroll
  for (int i = 0; i < Part::VECTORS; i++) {
    if (!Part::is_inside(to, i, token, feature)) continue;
    const Staged* from = slab + slab_index<Tile, Staged>(Part::row(i), Part::column());
    auto v = *reinterpret_cast<const Vector<Staged, Part::WIDTH>*>(from);
    Vector<Out, Part::WIDTH> o;
    if constexpr (sizeof(Staged) == 4)
      for (int j = 0; j < Part::WIDTH; j++) o.values[j] = from_float<Out>(v.values[j] + residual[i].values[j]);
    else o = v;
    uint4* place = reinterpret_cast<uint4*>(to.out + Part::place(to, i, token, feature));
    const uint4& bits = reinterpret_cast<const uint4&>(o);
    if (to.is_large) __stcs(place, bits);  // and leaves the cache to x
    else *place = bits;
  }
}

// The sums of a part of a tile to the output. A slab is written by features and read by tokens; there are two, so one
// barrier between writing and reading is enough. `which` says whose turn it is. The residual is read a slab ahead.
template <class Tile, class Staged, class Out>
DEVICE void store(const float* sums, const SharedMemory<Tile, Staged>& shared, const Output<Out>& to, int token,
                  int feature, int& which) {
  using Part = SlabPart<Tile, Staged, Out>;
  int consumer = threadIdx.x / WARP_GROUP;
  int row = feature + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
  float bias[2] = {0.f, 0.f};
  if (!Tile::GATED && to.bias && feature < to.N) bias[0] = to.bias[row], bias[1] = to.bias[row + 8];
  typename Part::Values residual, next;
  if constexpr (sizeof(Staged) == 4) load_residual<Part>(next, to, token, feature);
#pragma unroll
  for (int first = 0; first < Tile::PART_TOKENS; first += Part::ROWS) {
    if (token + first < to.n) {
      Staged* slab = shared.slab(consumer, which);
      write_slab<Tile>(slab, sums + first / 2, bias);
      if constexpr (sizeof(Staged) == 4) {
#pragma unroll
        for (int i = 0; i < Part::VECTORS; i++) residual[i] = next[i];
        if (first + Part::ROWS < Tile::PART_TOKENS) load_residual<Part>(next, to, token + first + Part::ROWS, feature);
      }
      sync_threads(1 + consumer, WARP_GROUP);
      read_slab<Tile, Part>(slab, residual, to, token + first, feature);
      which ^= 1;
    }
  }
}

// The sums of blocks that split k: to each its part, which it adds up and stores. `parity` is that of the inbox.
template <class Tile, class Shared, class Out>
DEVICE void exchange_and_store(float (&sums)[Tile::SUMS], const Shared& shared, const Output<Out>& to, int token,
                               int feature, int sharer, int part, u32& parity, int& which) {
  int consumer = threadIdx.x / WARP_GROUP;
  if (part < Tile::RECEIVERS && threadIdx.x % WARP_GROUP == 0)
    arrive_expecting(shared.inbox_full(consumer), (Tile::SPLIT - 1) * Tile::PART_BYTES);
  // The others have read the sums of the tile before.
  if (Tile::receivers(part) > 0) wait(shared.inbox_read(consumer), parity ^ 1);
  send_sums<Tile>(sums, shared, consumer, sharer, part);
  if (part < Tile::RECEIVERS) wait(shared.inbox_full(consumer), parity);
#pragma unroll
  for (int p = 0; p < Tile::RECEIVERS; p++) {  // registers must be known at compile time, this block's part is not
    if (p != part) continue;
    float* own = sums + p * Tile::PART_SUMS;
    receive_sums<Tile>(own, shared, consumer, sharer, part);
    store<Tile>(own, shared, to, token + p * Tile::PART_TOKENS, feature, which);
  }
  parity ^= 1;
}

template <class T, class Tile, class Shared, class Out>
DEVICE void consume(const Shared& shared, Schedule schedule, const Output<Out>& to, int sharer) {
  wait_for_previous();
  int consumer = threadIdx.x / WARP_GROUP, part = schedule.part;
  Ring<Tile::STAGES> ring;
  Place at;
  int which = 0;
  u32 parity = 0;
  while (schedule.next(at)) {
    float sums[Tile::SUMS];
    int steps = schedule.k_end - schedule.k_begin;
    if constexpr (Tile::REORDERS) multiply_codes_ahead<T, Tile>(sums, shared, ring, steps, part);
    else if constexpr (Tile::WEIGHTS == Weights::Q4) multiply_codes<T, Tile>(sums, shared, ring, steps, part);
    else multiply<T, Tile>(sums, shared, ring, steps, part);
    int feature = (at.features * Tile::SHARE + sharer) * Tile::FEATURES + consumer * Tile::GROUP_FEATURES;
    int token = at.tokens * Tile::TOKENS;
    if constexpr (Tile::SPLIT > 1)
      exchange_and_store<Tile>(sums, shared, to, token, feature, sharer, part, parity, which);
    else store<Tile>(sums, shared, to, token, feature, which);
  }
  if (Tile::SPLIT > 1 && Tile::receivers(part) > 0)
    wait(shared.inbox_read(consumer), parity ^ 1);  // others still arrive at this block's barriers
}

// ---- The kernels ---------------------------------------------------------------------------------------------------

// T: f16 or bf16. Out: T or float; RESIDUAL is needed only to add a residual to an output of type T. N is a multiple of
// 64, K of 32, with at least SPLIT steps. bias (N) and residual (n, N) may be null. Grid: clusters of
// Tile::CLUSTER blocks, at most as many as there are tiles.
template <class T, class Tile, bool RESIDUAL, class Out>
DEVICE void gemm_block(const Maps& maps, const Output<Out>& to, int K) {
  using Staged = typename Choose<RESIDUAL, float, Out>::type;
  DYNAMIC_SHARED(dynamic_shared);
  SharedMemory<Tile, Staged> shared{dynamic_shared};
  let_next_start();
  int rank = blockIdx.x % Tile::CLUSTER, sharer = rank % Tile::SHARE, part = rank / Tile::SHARE;
  if (threadIdx.x == 0) shared.init_barriers(part);
  if constexpr (Tile::CLUSTER > 1) sync_cluster();
  else __syncthreads();

  constexpr int WORKER_FEATURES = Tile::SHARE * Tile::FEATURES, STEP = Tile::DEPTH * BLOCK_K;
  Schedule schedule((to.N + WORKER_FEATURES - 1) / WORKER_FEATURES, (to.n + Tile::TOKENS - 1) / Tile::TOKENS,
                    NEAR_TOKENS / Tile::TOKENS, (K + STEP - 1) / STEP, blockIdx.x / Tile::CLUSTER,
                    gridDim.x / Tile::CLUSTER, part, Tile::SPLIT);
  if (threadIdx.x >= Tile::CONSUMERS * WARP_GROUP) {
    if constexpr (Tile::MOVES_REGISTERS) give_registers_back<Tile::PRODUCER_REGISTERS>();
    int thread = threadIdx.x - Tile::CONSUMERS * WARP_GROUP;
    if (thread == 0) produce<Tile>(shared, maps, schedule, sharer);
    else if (Tile::REORDERS && thread >= WARP) reorder<Tile>(shared, schedule, thread - WARP);
  } else {
    if constexpr (Tile::MOVES_REGISTERS) take_registers<Tile::CONSUMER_REGISTERS>();
    consume<T, Tile>(shared, schedule, to, sharer);
  }
}

}  // namespace gemm
