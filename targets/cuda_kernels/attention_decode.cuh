// Attention of one new token per sequence over its paged cache: what rope_append.cuh and attention_prefill.cuh do for
// any number of tokens. Queries are turned in the registers that multiply them. The new token's key and value come from
// the projections too: the warp whose tile they belong to puts them there, and into the cache.
//
// The kernel that computes the projections may still run when this one starts. What is read before it has ended, the
// lengths, the block table and the keys and values of tokens before the new one, was written before the step's first
// kernel began: that one does not overlap, and nothing in the step writes them.
//
// Grid (KV, blocks): the keys of all sequences are cut into pieces of about the same length, one for each block and
// key/value head, so that one long sequence among short ones keeps no block busy after the others. Lengths are known
// on the device only; `blocks` is fixed: sequences + how many pieces a head's keys should be cut into at least.
//
// The warps of a block take tiles of 16 keys in turn, each with stages of its own in shared memory, so that nothing
// but the last step needs a barrier. The query heads of the group are the 16 rows of the products (padded): one read
// of the keys and values serves all of them. Reading is all that takes time here, so padding costs nothing.
// Blocks of one sequence and head leave what they found in `partials`, and the last to arrive combines.
#pragma once
#include "attention_parts.cuh"
#include "rope_append.cuh"

constexpr int DECODE_KEYS = 16;  // of a tile

// Stages of keys and values; later the same memory holds what each warp found.
template <class A, int WARPS, int STAGES>
constexpr int DECODE_SHARED_BYTES = WARPS * STAGES * 2 * DECODE_KEYS * A::D * 2;

DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

// ---- which keys a block takes ----

// What the query of a sequence sees: keys begin .. end - 1, tiles first_tile .. last_tile - 1. `rounds`: how often a
// block takes a tile for each of its warps to go through them.
struct SeenKeys {
  int begin, end, first_tile, last_tile, rounds;
};
template <class A, int WARPS> DEVICE SeenKeys seen_keys(int tokens) {
  int begin = A::WINDOW && tokens > A::WINDOW ? tokens - A::WINDOW : 0;
  int first = begin / DECODE_KEYS, last = divide_up(tokens, DECODE_KEYS);
  return {begin, tokens, first, last, divide_up(last - first, WARPS)};
}

// Of the rounds of a sequence, one of `pieces` parts of the same length, give or take one.
struct Piece {
  int sequence;  // -1: none
  int piece, pieces;

  DEVICE int first_round(int rounds) const { return rounds * piece / pieces; }
  DEVICE int last_round(int rounds) const { return rounds * (piece + 1) / pieces; }
};

DEVICE int warp_total(int v) {
  for (int m = WARP / 2; m; m /= 2) v += shuffle_xor(v, m);
  return v;
}
// The sum of the values of lanes 0 .. lane.
DEVICE int warp_prefix(int v, int lane) {
  for (int m = 1; m < WARP; m *= 2) {
    int before = shuffle(v, (lane + WARP - m) % WARP);
    if (lane >= m) v += before;
  }
  return v;
}

// Cuts every sequence into pieces of at most `share` rounds, where share is what makes at most `blocks` of them, and
// returns the piece of number `block`. A lane looks at one sequence.
template <class A, int WARPS>
DEVICE Piece find_piece(const i32* seq_lens, int sequences, int block, int blocks, int lane) {
  auto rounds = [&](int s) { return s < sequences ? seen_keys<A, WARPS>(seq_lens[s]).rounds : 0; };
  int total = 0;
  for (int first = 0; first < sequences; first += WARP) total += rounds(first + lane);
  int share = divide_up(warp_total(total), blocks - sequences);
  if (share == 0) return {-1, 0, 0};
  for (int first = 0; first < sequences; first += WARP) {
    int pieces = divide_up(rounds(first + lane), share);
    int until = warp_prefix(pieces, lane), from = until - pieces;
    int found = warp_total(from <= block && block < until ? lane + 1 : 0) - 1;
    if (found >= 0) return {first + found, block - shuffle(from, found), shuffle(pieces, found)};
    block -= shuffle(until, WARP - 1);
  }
  return {-1, 0, 0};
}

// ---- the new token ----

DEVICE float2 load_two(const float* p) { return *reinterpret_cast<const float2*>(p); }
template <class T> DEVICE float2 load_two(const T* p) { return unpack<T>(*reinterpret_cast<const u32*>(p)); }
template <class T> DEVICE void store_two(T* p, u32 two) { *reinterpret_cast<u32*>(p) = two; }

// Columns c, c + 1 of a head, and c + D / 2, c + D / 2 + 1, which are turned with them.
struct Columns {
  float2 first, second;
};
template <int D, class T> DEVICE Columns load_columns(const T* head, int c) {
  return {load_two(head + c), load_two(head + D / 2 + c)};
}

// The projections (HEADS + 2 KV, D) of a token, and its angles (D / 2).
template <class A, class T> struct Projections {
  const T* qkv;
  const float *cos, *sin;

  DEVICE Columns turned(int head, int c) const {
    Columns v = load_columns<A::D>(qkv + head * A::D, c);
    float2 cosines = load_two(cos + c), sines = load_two(sin + c);
    turn(v.first.x, v.second.x, cosines.x, sines.x);
    turn(v.first.y, v.second.y, cosines.y, sines.y);
    return v;
  }
  DEVICE Columns value(int kv, int c) const { return load_columns<A::D>(qkv + (A::HEADS + A::KV + kv) * A::D, c); }
};

// Rounded to the type in which other steps hand queries over, then to the cache's.
template <class A> DEVICE u32 pack_query(float2 v) {
  v = unpack<typename A::Activation>(pack<typename A::Activation>(v.x, v.y));
  return pack<typename A::Number>(v.x, v.y);
}

// The group's heads as rows; rows from GROUP on are zeros. A lane holds both columns that are turned together.
template <class A, class T>
DEVICE QueryFragments<A::D, 1> decode_queries(const Projections<A, T>& token, int kv, int lane) {
  constexpr int HALF = A::D / 32;  // steps of 16 columns
  QueryFragments<A::D, 1> queries;
#pragma unroll
  for (int step = 0; step < HALF; step++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int head = lane / 4 + i % 2 * 8, column = step * 16 + i / 2 * 8 + lane % 4 * 2;
      Columns v = {{0, 0}, {0, 0}};
      if (head < A::GROUP) v = token.turned(kv * A::GROUP + head, column);
      queries.values[0][step][i] = pack_query<A>(v.first);
      queries.values[0][step + HALF][i] = pack_query<A>(v.second);
    }
  return queries;
}

// What a warp knows of the new token: the group's queries, and its key and value as the cache stores them, of which a
// lane holds columns 2 lane, 2 lane + 1 of every 64 in both halves.
template <class A> struct NewToken {
  using Number = typename A::Number;
  static constexpr int HALF = A::D / 2, SHARES = (HALF + 2 * WARP - 1) / (2 * WARP);
  QueryFragments<A::D, 1> queries;
  u32 key[SHARES][2], value[SHARES][2];
  Number* cached;  // where its key belongs, one head of it; null: it is not kept

  template <class T> DEVICE void read(const Projections<A, T>& token, Number* pages, int slot, int kv, int lane) {
    cached = slot < 0 ? nullptr : pages + PagedCache<A>::key_at(slot / A::PAGE, slot);
#pragma unroll
    for (int i = 0; i < SHARES; i++) {
      int column = (i * WARP + lane) * 2;
      if (column >= HALF) break;
      Columns k = token.turned(A::HEADS + kv, column), v = token.value(kv, column);
      key[i][0] = pack<Number>(k.first.x, k.first.y), key[i][1] = pack<Number>(k.second.x, k.second.y);
      value[i][0] = pack<Number>(v.first.x, v.first.y), value[i][1] = pack<Number>(v.second.x, v.second.y);
    }
    queries = decode_queries(token, kv, lane);
  }

  // Puts key and value into a row of a tile, and into the cache.
  DEVICE void put(Number* keys, Number* values, int row, int lane) const {
#pragma unroll
    for (int i = 0; i < 2 * SHARES; i++) {
      int share = i / 2, half = i % 2, column = (share * WARP + lane) * 2;
      if (column >= HALF) break;
      column += half * HALF;
      store_two(chunk_at<A::D>(keys, row, column / 8) + column % 8, key[share][half]);
      store_two(chunk_at<A::D>(values, row, column / 8) + column % 8, value[share][half]);
      if (!cached) continue;
      store_two(cached + column, key[share][half]);
      store_two(cached + PagedCache<A>::VALUES + column, value[share][half]);
    }
  }
};

// ---- the work of a warp ----

// Tokens outside begin .. end - 1 get no weight.
DEVICE void mask_keys(float (&scores)[1][DECODE_KEYS / 8][4], int first_key, int begin, int end, int lane) {
#pragma unroll
  for (int n = 0; n < DECODE_KEYS / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int key = first_key + n * 8 + lane % 4 * 2 + i % 2;
      if (key < begin || key >= end) scores[0][n][i] = MASKED;
    }
}

// The warp's tiles of a piece, each copied STAGES - 1 tiles before it is used. `read_token` gives the NewToken; it runs
// once the first copies, of keys before it, are under way.
template <class A, int WARPS, int STAGES, class ReadToken>
DEVICE void decode_tiles(Softmax<A::D, 1>& state, ReadToken read_token, const PagedCache<A>& cache,
                         const SeenKeys& seen, const Piece& piece, const Logits& l, typename A::Number* stages,
                         int warp, int lane) {
  constexpr int PAGES = PAGES_OF_TILE<A, DECODE_KEYS>, TILE = DECODE_KEYS * A::D;
  int newest = seen.end - 1;  // keys before it are in the cache
  int first = seen.first_tile + piece.first_round(seen.rounds) * WARPS + warp;
  int last = seen.first_tile + piece.last_round(seen.rounds) * WARPS;
  if (last > seen.last_tile) last = seen.last_tile;
  // Page numbers are read a tile ahead of the copy that needs them: lane p has that of the tile's page p.
  auto page_numbers = [&](int tile) {
    return cache.page_number(tile * DECODE_KEYS + (PAGES > 1 ? lane % PAGES * A::PAGE : 0), newest);
  };
  auto next_slot = [](int slot) { return slot + 1 == STAGES ? 0 : slot + 1; };
  int to_copy = first, copy_slot = 0, numbers = page_numbers(first);
  auto start_copy = [&] {
    if (to_copy < last) {
      auto number_of = [&](int row) { return PAGES > 1 ? shuffle(numbers, row / A::PAGE) : numbers; };
      typename A::Number* keys = stages + copy_slot * 2 * TILE;
      copy_tile<A, DECODE_KEYS, WARP>(keys, keys + TILE, cache, to_copy * DECODE_KEYS, seen.begin, newest, lane,
                                      number_of);
      numbers = page_numbers(to_copy + WARPS);
    }
    commit_copies();
    to_copy += WARPS;
    copy_slot = next_slot(copy_slot);
  };

  for (int i = 0; i < STAGES - 1; i++) start_copy();
  NewToken<A> token = read_token();
  int slot = 0;
  for (int tile = first; tile < last; tile += WARPS) {
    wait_copies<STAGES - 2>();
    sync_warp();  // the tile has arrived for all lanes, and all have left the slot that is filled next
    start_copy();
    typename A::Number* keys = stages + slot * 2 * TILE;
    if (tile == newest / DECODE_KEYS) {  // of one warp in all blocks
      token.put(keys, keys + TILE, newest % DECODE_KEYS, lane);
      sync_warp();
    }
    float scores[1][DECODE_KEYS / 8][4];
    multiply_keys<A::D, DECODE_KEYS>(scores, token.queries, keys, lane);
    cap_scores<A>(scores, l);
    int first_key = tile * DECODE_KEYS;
    if (first_key < seen.begin || first_key + DECODE_KEYS > seen.end)
      mask_keys(scores, first_key, seen.begin, seen.end, lane);
    scores_to_weights<true>(state, scores, l.factor);
    multiply_values<A::D, DECODE_KEYS>(state.out, scores, keys + TILE, lane);
    slot = next_slot(slot);
  }
  wait_copies<0>();
}

// ---- what warps and blocks found ----

// Results of warps side by side in shared memory. Rows are padded by 8 so that the rows of a fragment lie in
// different banks.
template <class A, int WARPS> struct WarpResults {
  float out[WARPS][A::GROUP][A::D + 8];
  float largest[WARPS][A::GROUP], total[WARPS][A::GROUP];

  DEVICE void put(const Softmax<A::D, 1>& state, int warp, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = row_sum(state.total[0][half]);
      int head = lane / 4 + half * 8;
      if (head >= A::GROUP) continue;
      largest[warp][head] = state.largest[0][half];
      total[warp][head] = sum;
#pragma unroll
      for (int n = 0; n < A::D / 8; n++)
        *reinterpret_cast<float2*>(&out[warp][head][n * 8 + lane % 4 * 2]) = {state.out[0][n][2 * half],
                                                                            state.out[0][n][2 * half + 1]};
    }
  }
};

// Outputs of a block: four columns, and how much they weigh, as the logarithm of a sum of weights.
struct Output4 {
  float4 values;
  float log_weight;
};
DEVICE void add_scaled(float4& sum, float4 v, float by) {
  sum.x += v.x * by, sum.y += v.y * by, sum.z += v.z * by, sum.w += v.w * by;
}
DEVICE float4 scaled(float4 v, float by) { return {v.x * by, v.y * by, v.z * by, v.w * by}; }

template <class A, int WARPS> DEVICE Output4 combine_warps(const WarpResults<A, WARPS>& found, int head, int column) {
  float largest = NO_LOGIT, total = 0;
  for (int warp = 0; warp < WARPS; warp++) largest = fmaxf(largest, found.largest[warp][head]);
  float4 sum = {0, 0, 0, 0};
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) {
    float by = exp2_fast(found.largest[warp][head] - largest);
    total += found.total[warp][head] * by;
    add_scaled(sum, *reinterpret_cast<const float4*>(&found.out[warp][head][column]), by);
  }
  return {scaled(sum, 1 / total), largest + log2f(total)};
}

// What the blocks of one sequence and head leave for the last of them: normalized outputs and their weights.
template <class A> struct Partials {
  float *outputs, *log_weights;  // (pieces, GROUP, D), (pieces, GROUP)
};

// Partials are read AT_ONCE at a time, since all that takes time is waiting for them.
template <class A> DEVICE float4 combine_pieces(const Partials<A>& parts, int pieces, int head, int column) {
  constexpr int AT_ONCE = 8;
  float largest = NO_LOGIT, total = 0;
  float4 sum = {0, 0, 0, 0};
  for (int first = 0; first < pieces; first += AT_ONCE) {
    float4 values[AT_ONCE];
    float log_weights[AT_ONCE], before = largest;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      bool valid = first + i < pieces;
      int row = (valid ? first + i : first) * A::GROUP + head;
      values[i] = *reinterpret_cast<const float4*>(&parts.outputs[row * A::D + column]);
      log_weights[i] = valid ? parts.log_weights[row] : MASKED;
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) largest = fmaxf(largest, log_weights[i]);
    float shrink = exp2_fast(before - largest);
    sum = scaled(sum, shrink), total *= shrink;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      float by = exp2_fast(log_weights[i] - largest);
      total += by;
      add_scaled(sum, values[i], by);
    }
  }
  return scaled(sum, 1 / total);
}

template <class T> DEVICE void store4(T* to, float4 v) {
  *reinterpret_cast<uint2*>(to) = {pack<T>(v.x, v.y), pack<T>(v.z, v.w)};
}

// Calls f(head, column) for four columns at a time of all heads, spread over the block's threads.
template <class A, int THREADS, class F> DEVICE void for_each_four(F f) {
  for (int i = threadIdx.x; i < A::GROUP * A::D / 4; i += THREADS) f(i / (A::D / 4), i % (A::D / 4) * 4);
}

// out: (sequences, HEADS, D); qkv: (sequences, HEADS + 2 KV, D); cos, sin: (sequences, D / 2); slots: (sequences),
// where the cache keeps the new token, negative: nowhere. block_table: (sequences, table_stride), read only where a
// sequence has tokens; seq_lens: tokens of each, the new one included; 0: padding, whose outputs are left as they are.
// partials: blocks * HEADS * (D + 1) floats; arrivals: sequences * KV counters, 0 before the first launch.
template <class A, int WARPS, int STAGES, class T>
DEVICE void attention_decode(typename A::Activation* out, const T* qkv, const float* cos, const float* sin,
                             const i32* slots, typename A::Number* pages, const i32* block_table, const i32* seq_lens,
                             float* partials, u32* arrivals, int sequences, int table_stride, float scale, float cap) {
  constexpr int THREADS = WARPS * WARP;
  using Results = WarpResults<A, WARPS>;
  static_assert(A::GROUP <= 16, "heads of a group are the rows of one product");
  static_assert(STAGES >= 2 && sizeof(Results) <= DECODE_SHARED_BYTES<A, WARPS, STAGES>, "results fit in the stages");
  DYNAMIC_SHARED(shared);
  let_next_start();
  int kv = blockIdx.x, blocks = gridDim.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  Piece piece = find_piece<A, WARPS>(seq_lens, sequences, blockIdx.y, blocks, lane);
  int s = piece.sequence;
  if (s < 0) return;  // without waiting: that other blocks do keeps what runs after this kernel behind the one before
  out += (i64(s) * A::HEADS + kv * A::GROUP) * A::D;
  auto read_token = [&] {
    wait_for_previous();
    Projections<A, T> projections = {qkv + i64(s) * ((A::HEADS + 2 * A::KV) * A::D), cos + s * (A::D / 2),
                                     sin + s * (A::D / 2)};
    NewToken<A> token;
    token.read(projections, pages + i64(kv) * (A::PAGE * A::D), slots[s], kv, lane);
    return token;
  };

  auto* stages = reinterpret_cast<typename A::Number*>(shared) + warp * STAGES * 2 * DECODE_KEYS * A::D;
  Softmax<A::D, 1> state;
  state.clear();
  decode_tiles<A, WARPS, STAGES>(state, read_token, paged_cache<A>(pages, kv, block_table, table_stride, s),
                                 seen_keys<A, WARPS>(seq_lens[s]), piece, logits<A>(scale, cap), stages, warp, lane);
  __syncthreads();  // all warps are done with their stages
  Results& found = *reinterpret_cast<Results*>(shared);
  found.put(state, warp, lane);
  __syncthreads();

  if (piece.pieces == 1) {
    for_each_four<A, THREADS>([&](int head, int column) {
      store4(out + head * A::D + column, combine_warps<A, WARPS>(found, head, column).values);
    });
    return;
  }
  // Pieces of one sequence and head lie side by side: this one at (kv, blockIdx.y), the first at `first_piece`.
  i64 first_piece = (i64(kv) * blocks + blockIdx.y - piece.piece) * A::GROUP;
  Partials<A> parts = {partials + first_piece * A::D, partials + i64(blocks) * A::HEADS * A::D + first_piece};
  for_each_four<A, THREADS>([&](int head, int column) {
    Output4 o = combine_warps<A, WARPS>(found, head, column);
    int row = piece.piece * A::GROUP + head;
    *reinterpret_cast<float4*>(&parts.outputs[row * A::D + column]) = o.values;
    if (column == 0) parts.log_weights[row] = o.log_weight;
  });
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = arrives_last(&arrivals[s * A::KV + kv], piece.pieces);
  __syncthreads();
  if (!last) return;
  for_each_four<A, THREADS>([&](int head, int column) {
    store4(out + head * A::D + column, combine_pieces<A>(parts, piece.pieces, head, column));
  });
}
