// Causal attention of chunks of tokens over their paged caches: several sequences, each with any number of new tokens.
//
// Rows are (token, head of the group) pairs, so that one tile of keys and values serves all heads of a group, and a
// sequence with a single new token still fills rows. A block takes WARPS * BLOCKS * 16 rows of one sequence and one
// key/value head and goes through the tiles of KEYS keys that they see, the copy of the next tile behind the
// products of this one. Tiles wholly after a warp's rows, or before their windows, are skipped; only tiles that some
// row sees in part are masked.
//
// Where MASKS is Tree, a sequence of at most TREE_TOKENS new tokens may end with a token tree: its tokens' words in
// tree_masks are not 0 then, and bit i tells whether a token sees the i-th of the new ones. Tiles that only have keys
// before them need no words.
//
// Grid (KV, tiles): tile counts are known on the device only, so the host launches row_tiles(tokens, sequences) of
// them, enough for any lengths, and those without rows leave.
#pragma once
#include "attention_parts.cuh"

constexpr int TREE_TOKENS = 32;

template <class A, int WARPS, int BLOCKS, int KEYS> struct PrefillShape {
  static constexpr int THREADS = WARPS * WARP, ROWS = WARPS * BLOCKS * 16, PAGES = PAGES_OF_TILE<A, KEYS>;
  // Query fragments stay in registers where the accumulators leave room for them.
  static constexpr bool QUERIES_IN_REGISTERS = BLOCKS == 1 && A::D <= 128;
};

// Shared memory of a block.
template <class A, class Shape, int KEYS> struct PrefillTiles {
  using T = typename A::Number;
  T queries[Shape::ROWS * A::D];
  T keys[2][KEYS * A::D], values[2][KEYS * A::D];
  i32 page_numbers[2][Shape::PAGES];
};
template <class A, int WARPS, int BLOCKS, int KEYS>
constexpr int PREFILL_SHARED_BYTES = sizeof(PrefillTiles<A, PrefillShape<A, WARPS, BLOCKS, KEYS>, KEYS>);

// Sequence s owns the grid's tiles first_row_tile(s) .. first_row_tile(s + 1) - 1: at least as many as its rows fill,
// and known without a sum over the sequences before it.
template <class A, int ROWS> DEVICE int first_row_tile(const i32* query_start, int s) {
  return query_start[s] * A::GROUP / ROWS + s;
}

// The rows of a block, rows first .. last - 1 of the sequence's.
struct RowTile {
  int sequence;  // -1: no rows
  int first_token, tokens;  // of the sequence, among all new tokens
  int first, last;
};

template <class A, int ROWS, int THREADS> DEVICE RowTile find_rows(const i32* query_start, int sequences, int tile) {
  __shared__ int found;
  if (threadIdx.x == 0) found = -1;
  __syncthreads();
  auto first_tile = [&](int s) { return first_row_tile<A, ROWS>(query_start, s); };
  for (int s = threadIdx.x; s < sequences; s += THREADS)
    if (first_tile(s) <= tile && tile < first_tile(s + 1)) found = s;
  __syncthreads();
  int s = found;
  if (s < 0) return {-1, 0, 0, 0, 0};
  int first_token = query_start[s], tokens = query_start[s + 1] - first_token, rows = tokens * A::GROUP;
  int first = (tile - first_tile(s)) * ROWS;
  if (first >= rows) return {-1, 0, 0, 0, 0};
  return {s, first_token, tokens, first, first + ROWS < rows ? first + ROWS : rows};
}

// Copies the block's query rows to shared memory; rows beyond the sequence's become zeros. `q` is at the first token
// of the sequence and the first head of the group.
template <class A, int ROWS, int THREADS>
DEVICE void load_queries(typename A::Number* to, const typename A::Activation* q, const RowTile& rows) {
  using T = typename A::Number;
  using Activation = typename A::Activation;
  constexpr int CHUNKS = A::D / 8;
#pragma unroll 4
  for (u32 i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    int row = i / CHUNKS, chunk = i % CHUNKS, token = u32(rows.first + row) / A::GROUP;
    int head = u32(rows.first + row) % A::GROUP;
    uint4 v = {0, 0, 0, 0};
    if (rows.first + row < rows.last)
      v = *reinterpret_cast<const uint4*>(q + (i64(token) * A::HEADS + head) * A::D + chunk * 8);
    u32 eight[4] = {v.x, v.y, v.z, v.w};
    for (u32& two : eight) {
      float2 f = unpack<Activation>(two);
      two = pack<T>(f.x, f.y);
    }
    *reinterpret_cast<uint4*>(chunk_at<A::D>(to, row, chunk)) = {eight[0], eight[1], eight[2], eight[3]};
  }
}

// Every token sees those before it.
struct Causal {
  static constexpr bool MAY_EXIST = false, exists = false;
  template <class A> DEVICE void load(const i32*, const i32*, const RowTile&, int) {}
};

// The new tokens of a block's sequence, if it ends with a tree; in shared memory, since registers are few. Tokens before
// the tree have masks here, too.
struct Tree {
  static constexpr bool MAY_EXIST = true;
  u32 masks[TREE_TOKENS];
  int positions[TREE_TOKENS];
  int cached;  // tokens before them
  int exists;

  // By the threads of a block, who wait for each other before they look.
  template <class A> DEVICE void load(const i32* masks_, const i32* positions_, const RowTile& rows, int cached_) {
    static_assert(TREE_TOKENS == WARP, "a lane for each token");
    if (threadIdx.x >= WARP) return;
    int token = threadIdx.x;
    u32 mask = rows.tokens <= TREE_TOKENS && token < rows.tokens ? masks_[rows.first_token + token] : 0;
    u32 plain = 0xffffffff >> (TREE_TOKENS - 1 - token);
    if (A::WINDOW && token >= A::WINDOW) plain &= 0xfffffffe << (token - A::WINDOW);
    masks[token] = mask ? mask : plain;
    if (A::WINDOW) positions[token] = mask ? positions_[rows.first_token + token] : cached_ + token;
    exists = any_lane(mask), cached = cached_;
  }
};

// Places in the cache of the rows of a lane, and of the first and last row of its warp; last = -1: no rows, and so no
// key to see. Where there is a tree, all of its keys may be seen.
template <int BLOCKS> struct RowPositions {
  int of[BLOCKS][2];
  int first, last;
};
template <class A, int BLOCKS>
DEVICE RowPositions<BLOCKS> row_positions(const RowTile& rows, int cached, bool has_tree, int warp, int lane) {
  int first = rows.first + warp * BLOCKS * 16;
  // Rows past the last stand for it: what they compute is dropped.
  auto position = [&](int row) { return cached + int(u32(row < rows.last ? row : rows.last - 1) / A::GROUP); };
  RowPositions<BLOCKS> p;
  for (int block = 0; block < BLOCKS; block++)
    for (int half = 0; half < 2; half++) p.of[block][half] = position(first + block * 16 + half * 8 + lane / 4);
  p.first = position(first), p.last = first < rows.last ? position(first + BLOCKS * 16 - 1) : -1;
  if (has_tree) {
    p.first = cached - 1;  // a tree's first token need not be seen by the others
    if (p.last >= 0) p.last = cached + rows.tokens - 1;
  }
  return p;
}

template <class A, int TILES, int BLOCKS>
DEVICE void mask_unseen(float (&scores)[BLOCKS][TILES][4], const RowPositions<BLOCKS>& positions, const Causal&,
                        int first_key, int lane) {
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int key = first_key + n * 8 + lane % 4 * 2 + i % 2, position = positions.of[block][i / 2];
        if (key > position || (A::WINDOW && key <= position - A::WINDOW)) scores[block][n][i] = MASKED;
      }
}

template <class A, int TILES, int BLOCKS>
DEVICE void mask_unseen(float (&scores)[BLOCKS][TILES][4], const RowPositions<BLOCKS>& positions, const Tree& tree,
                        int first_key, int lane) {
  if (!tree.exists) return mask_unseen<A>(scores, positions, Causal{}, first_key, lane);
  int first_own = first_key + lane % 4 * 2 - tree.cached;
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int own = first_own + n * 8 + i;
      u32 bit = own < 0 ? 0xffffffff : own < TREE_TOKENS ? 1u << own : 0;
#pragma unroll
      for (int block = 0; block < BLOCKS; block++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int token = positions.of[block][half] - tree.cached;
          bool is_seen = tree.masks[token] & bit;
          if (A::WINDOW && own < 0) is_seen = own + tree.cached > tree.positions[token] - A::WINDOW;
          if (!is_seen) scores[block][n][2 * half + i] = MASKED;
        }
    }
}

// One tile of keys for the rows of a warp.
template <class A, int KEYS, int BLOCKS, class Queries, class Masks>
DEVICE void prefill_tile(Softmax<A::D, BLOCKS>& state, const Queries& queries, const typename A::Number* keys,
                         const typename A::Number* values, const RowPositions<BLOCKS>& positions, const Masks& masks,
                         int first_key, const Logits& l, int lane) {
  int last_key = first_key + KEYS - 1;
  if (first_key > positions.last || (A::WINDOW && last_key <= positions.first - A::WINDOW)) return;
  float scores[BLOCKS][KEYS / 8][4];
  multiply_keys<A::D, KEYS>(scores, queries, keys, lane);
  cap_scores<A>(scores, l);
  if (last_key > positions.first || (A::WINDOW && first_key <= positions.last - A::WINDOW))
    mask_unseen<A>(scores, positions, masks, first_key, lane);
  scores_to_weights<false>(state, scores, l.factor);
  multiply_values<A::D, KEYS>(state.out, scores, values, lane);
}

// `out` is at the first token of the sequence and the first head of the group.
template <class A, int BLOCKS>
DEVICE void store_rows(typename A::Activation* out, const Softmax<A::D, BLOCKS>& state, const RowTile& rows, int warp,
                       int lane) {
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float by = 1 / row_sum(state.total[block][half]);
      int row = rows.first + (warp * BLOCKS + block) * 16 + half * 8 + lane / 4;
      if (row >= rows.last) continue;
      i64 at = i64(u32(row) / A::GROUP) * A::HEADS + u32(row) % A::GROUP;
#pragma unroll
      for (int n = 0; n < A::D / 8; n++) {
        const float(&v)[4] = state.out[block][n];
        *reinterpret_cast<u32*>(out + at * A::D + n * 8 + lane % 4 * 2) =
            pack<typename A::Activation>(v[2 * half] * by, v[2 * half + 1] * by);
      }
    }
}

// Brings tiles of keys begin .. end - 1 to shared memory: tile i to place i % 2. Its page numbers take a step before
// that, from the block table through a register of some threads (read, keep) to shared memory.
template <class A, class Shape, int KEYS> struct TileLoader {
  PrefillTiles<A, Shape, KEYS>& tiles;
  PagedCache<A> cache;
  int begin, end;

  DEVICE i32 read_page_number(int tile) const {
    if (threadIdx.x >= Shape::PAGES) return 0;
    return cache.page_number(tile * KEYS + threadIdx.x * (Shape::PAGES > 1 ? A::PAGE : 0), end);
  }
  DEVICE void keep_page_number(int tile, i32 number) const {
    if (threadIdx.x < Shape::PAGES) tiles.page_numbers[tile % 2][threadIdx.x] = number;
  }
  DEVICE void start_copy(int tile) const {
    const i32* numbers = tiles.page_numbers[tile % 2];
    copy_tile<A, KEYS, Shape::THREADS>(tiles.keys[tile % 2], tiles.values[tile % 2], cache, tile * KEYS, begin, end,
                                       threadIdx.x,
                                       [&](int row) { return numbers[Shape::PAGES > 1 ? row / A::PAGE : 0]; });
    commit_copies();
  }
};

// Tiles first .. last - 1 for all rows of the block; the copy of the first has been started. The copy of the next tile
// runs behind the products of this one, and so do the reads of the page numbers of the tile after that.
template <class A, class Shape, int KEYS, int BLOCKS, class Queries, class Masks>
DEVICE void prefill_tiles(Softmax<A::D, BLOCKS>& state, const Queries& queries,
                          const TileLoader<A, Shape, KEYS>& loader, int first, int last,
                          const RowPositions<BLOCKS>& positions, const Masks& masks, const Logits& l, int lane) {
  for (int tile = first; tile < last; tile++) {
    wait_copies<0>();
    __syncthreads();  // the tile has arrived for all threads, and all are done with the one before it
    i32 number = loader.read_page_number(tile + 2);
    if (tile + 1 < last) loader.start_copy(tile + 1);
    prefill_tile<A, KEYS, BLOCKS>(state, queries, loader.tiles.keys[tile % 2], loader.tiles.values[tile % 2], positions,
                                  masks, tile * KEYS, l, lane);
    loader.keep_page_number(tile, number);
  }
}

// out, q: (tokens, HEADS, D). block_table: (sequences, table_stride), read only where a sequence has tokens;
// seq_lens: tokens of each sequence, the new ones included; query_start: (sequences + 1), new tokens of sequence s are
// rows query_start[s] .. query_start[s + 1] - 1. Other rows are left as they are. tree_masks, tree_positions: (tokens), of
// which positions are read only for tokens in a tree; the others' are known from the lengths.
template <class A, int WARPS, int BLOCKS, int KEYS, class Masks = Causal>
DEVICE void attention_prefill(typename A::Activation* out, const typename A::Activation* q,
                              const typename A::Number* pages, const i32* block_table, const i32* seq_lens,
                              const i32* query_start, int sequences, int table_stride, float scale, float cap,
                              const i32* tree_masks = nullptr, const i32* tree_positions = nullptr) {
  using T = typename A::Number;
  using Shape = PrefillShape<A, WARPS, BLOCKS, KEYS>;
  constexpr int ROWS = Shape::ROWS, THREADS = Shape::THREADS;
  static_assert(Shape::PAGES <= THREADS && KEYS % 16 == 0, "a thread reads each page number");
  DYNAMIC_SHARED(shared);
  auto& tiles = *reinterpret_cast<PrefillTiles<A, Shape, KEYS>*>(shared);
  let_next_start();
  wait_for_previous();

  // Later rows see more keys: they come first, and short blocks fill the gaps at the end.
  RowTile rows = find_rows<A, ROWS, THREADS>(query_start, sequences, gridDim.y - 1 - blockIdx.y);
  if (rows.sequence < 0) return;
  int kv = blockIdx.x, s = rows.sequence, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int cached = seq_lens[s] - rows.tokens;
  if (cached < 0) return;
  // Rows of a tree may see all new keys, and none of their positions is below `cached`.
  bool may_be_tree = Masks::MAY_EXIST && rows.tokens <= TREE_TOKENS;
  int first_position = cached + (may_be_tree ? 0 : rows.first / A::GROUP);
  int end = cached + (may_be_tree ? rows.tokens : (rows.last - 1) / A::GROUP + 1);
  int begin = A::WINDOW && first_position >= A::WINDOW ? first_position - A::WINDOW + 1 : 0;
  TileLoader<A, Shape, KEYS> loader = {tiles, paged_cache<A>(pages, kv, block_table, table_stride, s), begin, end};
  int first = begin / KEYS, last = (end + KEYS - 1) / KEYS;
  for (int tile = first; tile < first + 2; tile++) loader.keep_page_number(tile, loader.read_page_number(tile));
  __syncthreads();
  loader.start_copy(first);

  __shared__ Masks masks;
  masks.template load<A>(tree_masks, tree_positions, rows, cached);
  i64 first_row = i64(rows.first_token) * A::HEADS + kv * A::GROUP;
  load_queries<A, ROWS, THREADS>(tiles.queries, q + first_row * A::D, rows);
  __syncthreads();
  QueryTile<T, A::D> query_tile = {tiles.queries + warp * BLOCKS * 16 * A::D, lane};
  RowPositions<BLOCKS> positions = row_positions<A, BLOCKS>(rows, cached, masks.exists, warp, lane);
  Logits l = logits<A>(scale, cap);
  Softmax<A::D, BLOCKS> state;
  state.clear();

  if constexpr (Shape::QUERIES_IN_REGISTERS)
    prefill_tiles<A, Shape, KEYS, BLOCKS>(state, to_registers<A::D, BLOCKS>(query_tile), loader, first, last, positions,
                                          masks, l, lane);
  else
    prefill_tiles<A, Shape, KEYS, BLOCKS>(state, query_tile, loader, first, last, positions, masks, l, lane);
  store_rows<A, BLOCKS>(out + first_row * A::D, state, rows, warp, lane);
}
