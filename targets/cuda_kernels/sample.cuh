// From logits to tokens: what mlcgen/runtime/sampler.py does, one block a row.
//
// A token's probability is a whole number ("mass"), in units of 2^-44 of the most likely token's. Sums of masses are
// exact, so they do not depend on which thread comes first, and the same random number always gives the same token.
//
// Everything is one question, put to `find`: at which element does a running sum pass a target? Asked of tokens in the
// order of their ids, it draws one. Asked of the bins of a histogram, and then of finer bins within the bin found, it
// gives the k-th largest logit or the end of the nucleus without sorting (`select`, a radix select).
//
// The whole row is read for its maximum, again for the sum of masses, and with top-k or top-p once more for a list of
// the few tokens that matter from then on (where over a thousand matter, a few times more).
#pragma once
#include "primitives.cuh"

DEVICE float infinity() { return __int_as_float(0x7f800000); }

struct Best {
  float value;
  i32 index;
};

// The larger value, of equal ones the smaller index; a NaN is larger than everything, so that it is noticed.
DEVICE Best better(Best a, Best b) {
  if (isnan(a.value) || isnan(b.value)) return isnan(a.value) ? a : b;
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

template <int THREADS> DEVICE Best block_best(Best best) {
  __shared__ Best warps[THREADS / WARP];
  for (int m = WARP / 2; m; m /= 2) best = better(best, {shuffle_xor(best.value, m), shuffle_xor(best.index, m)});
  __syncthreads();
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = best;
  __syncthreads();
  best = warps[0];
  for (int i = 1; i < THREADS / WARP; i++) best = better(best, warps[i]);
  return best;
}

// ids, values (rows,): the most likely token of each row of logits (rows, vocab) and its logit. A row's blocks (gridDim.x)
// take a part of it each. parts (rows, gridDim.x); counters (rows,): 0 before and after.
template <int THREADS>
DEVICE void argmax_of_parts(const float* logits, Best* parts, u32* counters, i32* ids, float* values, int vocab) {
  const int row = blockIdx.y, num_parts = gridDim.x, length = (vocab + num_parts - 1) / num_parts;
  const int begin = blockIdx.x * length, end = min(begin + length, vocab);
  logits += i64(row) * vocab;
  parts += row * num_parts;
  Best best = {-infinity(), 0};
#pragma unroll 4
  for (int i = begin + threadIdx.x; i < end; i += THREADS) best = better(best, {logits[i], i});
  best = block_best<THREADS>(best);
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = best;
  if (!arrives_last(&counters[row], num_parts)) return;
  best = parts[0];
  for (int i = 1; i < num_parts; i++) best = better(best, parts[i]);
  ids[row] = best.index;
  values[row] = best.value;
}

// ---- what the host uploads: mlcgen/runtime/device_sampler.py packs these ----

namespace sampling {

struct Row {
  double uniform;  // the row's random number in [0, 1)
  double top_p, presence_penalty, frequency_penalty;
  float inverse_temperature;  // 0: greedy
  float min_p, repetition_penalty;
  i32 top_k;         // 0: all
  i32 num_logprobs;  // -1: none are wanted, not even the chosen token's
  i32 mask;          // which of the masks; -1: none
  i32 biased, seen, banned, end;  // the row's changes: biased .. seen, seen .. banned, banned .. end
};

// Of one token's logit. `value` is a bias (float), or how often the token is in the output, or nothing.
struct Change {
  i32 token, value;
};

constexpr int SAMPLE_THREADS = 1024, SAMPLE_WARPS = SAMPLE_THREADS / WARP;
constexpr int MAX_LOGPROBS = 32;  // of the best tokens
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS;
constexpr int MAX_LISTED = SAMPLE_THREADS;

// Shared memory of a block.
struct Scratch {
  u64 sums[SAMPLE_WARPS];
  u32 low[BINS], high[BINS];                  // halves of a histogram's sums
  i32 found[MAX_LISTED], listed[MAX_LISTED];  // token ids: in no order, in ascending order
  int count;                                  // of those found
};

// ---- the row's tokens ----

constexpr float ONE = 0x1p44f;  // the most likely token's mass: 2^18 times this still fits into 64 bits

// The candidates: at first the whole vocabulary, then a short list if one can be made.
struct Tokens {
  const float* logits;  // (vocab,)
  const u32* allowed;   // a bit for each token; null: all are
  int count;
  float inverse_temperature, min_p;
  const i32* ids = nullptr;    // (count,) ascending; null: 0 .. count - 1
  bool is_wide = false;        // too many for a list
  float top = 0;               // the largest logit
  float lowest = -infinity();  // logits below are no candidates

  DEVICE int id(int i) const { return ids ? ids[i] : i; }
  DEVICE float logit(int i) const {
    int token = id(i);
    bool is_allowed = !allowed || (allowed[token / 32] >> token % 32 & 1);
    return is_allowed ? logits[token] : -infinity();
  }
  // The probability of a token with this logit, relative to the most likely one's.
  DEVICE float weight(float logit) const {
    float weight = expf((logit - top) * inverse_temperature);
    return logit >= lowest && weight >= min_p ? weight : 0;
  }
};

DEVICE u64 mass_of(float weight) { return static_cast<u64>(weight * ONE); }

// do_with(i, logit) for each token, shared out among the threads. Logits are read some at a time, so that one does not
// wait for the other.
template <class Do> DEVICE void for_each(const Tokens& tokens, Do do_with) {
  constexpr int AT_ONCE = 4;
  for (int start = threadIdx.x; start < tokens.count; start += AT_ONCE * SAMPLE_THREADS) {
    float logits[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      int i = start + k * SAMPLE_THREADS;
      logits[k] = i < tokens.count ? tokens.logit(i) : 0;
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++)
      if (int i = start + k * SAMPLE_THREADS; i < tokens.count) do_with(i, logits[k]);
  }
}

DEVICE Best best_of(const Tokens& tokens) {
  Best best = {-infinity(), 0};
  for_each(tokens, [&](int i, float logit) { best = better(best, {logit, tokens.id(i)}); });
  return block_best<SAMPLE_THREADS>(best);
}

// ---- running sums ----

// What a running sum is to exceed, which must be less than the sum of all.
struct Target {
  enum { NUMBER, SHARE, REACHED } kind;
  u64 number;  // the target itself, or what to leave out of the sum
  double fraction;

  DEVICE u64 of(u64 sum) const {
    sum -= number;
    if (kind == SHARE) return min(static_cast<u64>(fraction * sum), sum - 1);
    if (kind == REACHED) return min(static_cast<u64>(ceil(fraction * sum)), sum) - 1;
    return number;
  }
};
DEVICE Target exactly(u64 number) { return {Target::NUMBER, number, 0}; }
// A fraction in [0, 1) of the sum.
DEVICE Target share(double fraction, u64 left_out = 0) { return {Target::SHARE, left_out, fraction}; }
// Where the running sum becomes at least this fraction, in (0, 1], of the sum.
DEVICE Target reached(double fraction, u64 left_out = 0) { return {Target::REACHED, left_out, fraction}; }

struct Place {
  int index;
  u64 before;  // the sum of all amounts before it
  u64 target, total;
};

DEVICE u64 warp_sum(u64 v) {
  for (int m = WARP / 2; m; m /= 2) v += shuffle_xor(v, m);
  return v;
}

// The first of n elements at which the running sum of amount(i) exceeds the target. Each warp adds up one 32nd of the
// elements; then the same is done within the 32nd where that is.
template <class Amount> DEVICE Place find(Scratch& scratch, int n, Amount amount, const Target& wanted) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  Place place = {};
  int end = n, rest = n;
  do {
    const int length = (rest + SAMPLE_WARPS - 1) / SAMPLE_WARPS, begin = place.index + warp * length;
    const int stop = min(begin + length, end);
    u64 sum = 0;
#pragma unroll 4
    for (int i = begin + lane; i < stop; i += WARP) sum += amount(i);
    sum = warp_sum(sum);
    __syncthreads();
    if (lane == 0) scratch.sums[warp] = sum;
    __syncthreads();
    if (rest == n) {
      for (u64 sum : scratch.sums) place.total += sum;
      place.target = wanted.of(place.total);
    }
    int segment = 0;
    while (segment < SAMPLE_WARPS - 1 && place.before + scratch.sums[segment] <= place.target)
      place.before += scratch.sums[segment++];
    place.index = min(place.index + segment * length, end - 1);
    end = min(place.index + length, end);
    rest = end - place.index;
  } while (rest > 8);
  for (u64 next; place.index < end - 1 && (next = place.before + amount(place.index)) <= place.target;)
    place.before = next, place.index++;
  return place;
}

// ---- radix select ----

// Orders of tokens, as keys: the largest key comes first.
struct ByLogit {
  static constexpr int KEY_BITS = 32;
  static DEVICE u32 key(float logit, float) {
    u32 bits = __float_as_uint(logit + 0.f);  // -0 is 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  static DEVICE float logit(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }
  static DEVICE u64 mass(u32 key, const Tokens& tokens) { return mass_of(tokens.weight(logit(key))); }
};
struct ByWeight {
  static constexpr int KEY_BITS = 29;
  static constexpr u32 LEAST = 81u << 23;  // 2^-46: what is less likely has no mass
  static DEVICE u32 key(float, float weight) { return max(__float_as_uint(weight), LEAST) - LEAST; }
  static DEVICE u64 mass(u32 key, const Tokens&) { return mass_of(__uint_as_float(key + LEAST)); }
};

struct CountEach {
  DEVICE u32 operator()(float) const { return 1; }
};
struct MassOfEach {
  DEVICE u64 operator()(float weight) const { return mass_of(weight); }
};

// Where the running sum of amounts exceeds `target`, in an order: at one of the tokens with this key.
struct Cut {
  u32 key;
  u64 above, equal;  // the sums over tokens with larger keys, and with this one
  u64 coarse_above;  // the sum over tokens whose keys differ already in the first BIN_BITS
  u64 target;

  // Which of the tokens with this key, if each has `mass`.
  DEVICE u64 nth(u64 mass) const { return (target - above) / mass; }
  // The running sum with that token.
  DEVICE u64 reached(u64 mass) const { return above + (nth(mass) + 1) * mass; }
};

// Adds to a bin of the histogram. 32-bit additions are what the hardware has in shared memory.
DEVICE void add_to_bin(Scratch& scratch, int bin, u32 amount) { atomicAdd(&scratch.low[bin], amount); }
DEVICE void add_to_bin(Scratch& scratch, int bin, u64 amount) {
  if (amount == 0) return;  // most tokens, maybe, and all to one bin
  u32 part = static_cast<u32>(amount), before = atomicAdd(&scratch.low[bin], part);
  u32 carried = static_cast<u32>(amount >> 32) + (before + part < before);
  if (carried) atomicAdd(&scratch.high[bin], carried);
}

// The sums of amounts by (key - base) >> shift, as far as those are bins.
template <class Order, class Amount>
DEVICE void fill_bins(Scratch& scratch, const Tokens& tokens, Amount amount, u32 base, int shift, int bins) {
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += SAMPLE_THREADS) scratch.low[i] = scratch.high[i] = 0;
  __syncthreads();
  for_each(tokens, [&](int, float logit) {
    float weight = tokens.weight(logit);
    u32 bin = (Order::key(logit, weight) - base) >> shift;
    if (bin < u32(bins)) add_to_bin(scratch, bin, amount(weight));
  });
  __syncthreads();
}

// Make a list of the tokens with at least this key, unless they are too many.
template <class Order> DEVICE void narrow(Scratch& scratch, Tokens& tokens, u32 lowest_key) {
  if (threadIdx.x == 0) scratch.count = 0;
  __syncthreads();
  const volatile int& so_far = scratch.count;
  for_each(tokens, [&](int i, float logit) {
    if (so_far > MAX_LISTED || Order::key(logit, tokens.weight(logit)) < lowest_key) return;
    int at = atomicAdd(&scratch.count, 1);
    if (at < MAX_LISTED) scratch.found[at] = i;
  });
  __syncthreads();
  const int count = scratch.count;
  tokens.is_wide = count > MAX_LISTED;
  if (tokens.is_wide) return;
  if (threadIdx.x < count) {  // each to the place that is its rank
    const i32 id = scratch.found[threadIdx.x];
    int rank = 0;
    for (int i = 0; i < count; i++) rank += scratch.found[i] < id;
    scratch.listed[rank] = id;
  }
  tokens.ids = scratch.listed;
  tokens.count = count;
  __syncthreads();
}

// Digit by digit from the first: a histogram of the tokens whose digits so far are those of the cut. Tokens below the
// bin of the first digit are dropped: nothing after the cut will be asked for. One function, for less code.
template <class Order, class Amount>
__device__ __noinline__ Cut select(Scratch& scratch, Tokens& candidates, Amount amount, Target wanted) {
  Tokens tokens = candidates;
  Cut cut = {};
  int shift = Order::KEY_BITS;
  do {
    const bool is_first = shift == Order::KEY_BITS;
    const int bits = min(shift, BIN_BITS), bins = 1 << bits;
    shift -= bits;
    fill_bins<Order>(scratch, tokens, amount, cut.key, shift, bins);
    auto sum_in = [&](int i) { return u64(scratch.high[bins - 1 - i]) << 32 | scratch.low[bins - 1 - i]; };
    const Place place = find(scratch, bins, sum_in, is_first ? wanted : exactly(cut.target - cut.above));
    cut.key += static_cast<u32>(bins - 1 - place.index) << shift;
    cut.above += place.before;
    cut.equal = sum_in(place.index);
    if (is_first) {
      cut.target = place.target;
      cut.coarse_above = cut.above;
      if (!tokens.ids && !tokens.is_wide) narrow<Order>(scratch, tokens, cut.key);
    }
  } while (shift > 0);
  candidates = tokens;
  return cut;
}

// The id of the n-th of the tokens with this key, in the order of their ids.
template <class Order> DEVICE int nth_id(Scratch& scratch, const Tokens& tokens, u32 key, u64 n) {
  auto is_equal = [&](int i) {
    float logit = tokens.logit(i);
    return u64(Order::key(logit, tokens.weight(logit)) == key);
  };
  return tokens.id(find(scratch, tokens.count, is_equal, exactly(n)).index);
}

// ---- drawing ----

// The token at which the running sum of masses exceeds the target, in an order.
template <class Order> DEVICE int draw_in_order(Scratch& scratch, Tokens& tokens, Target target) {
  Cut cut = select<Order>(scratch, tokens, MassOfEach(), target);
  return nth_id<Order>(scratch, tokens, cut.key, cut.nth(Order::mass(cut.key, tokens)));
}

// Likewise in the order of ids, among the tokens with at least this key ByWeight.
DEVICE int draw_by_id(Scratch& scratch, const Tokens& tokens, u32 least_key, Target target) {
  auto mass = [&](int i) {
    float weight = tokens.weight(tokens.logit(i));
    return ByWeight::key(0, weight) >= least_key ? mass_of(weight) : 0;
  };
  return tokens.id(find(scratch, tokens.count, mass, target).index);
}

// One of the k best tokens, which are in the order of their logits; of equal ones at the end those with lower ids.
DEVICE int draw_of_top_k(Scratch& scratch, Tokens& tokens, const Row& row) {
  Cut last = select<ByLogit>(scratch, tokens, CountEach(), exactly(row.top_k - 1));
  tokens.lowest = ByLogit::logit(last.key);
  const u64 left_out = (last.above + last.equal - row.top_k) * ByLogit::mass(last.key, tokens);
  Target target = share(row.uniform, left_out);
  if (row.top_p < 1) {
    Cut end = select<ByLogit>(scratch, tokens, MassOfEach(), reached(row.top_p, left_out));
    target = exactly(share(row.uniform).of(end.reached(ByLogit::mass(end.key, tokens))));
  }
  return draw_in_order<ByLogit>(scratch, tokens, target);
}

// One of the nucleus. In the order of sampler.py: what is likelier than the last bin by ids, then that bin by weights.
DEVICE int draw_of_nucleus(Scratch& scratch, Tokens& tokens, const Row& row) {
  Cut end = select<ByWeight>(scratch, tokens, MassOfEach(), reached(row.top_p));
  const u64 target = share(row.uniform).of(end.reached(ByWeight::mass(end.key, tokens)));
  constexpr int BIN_SHIFT = ByWeight::KEY_BITS - BIN_BITS;
  static_assert(BIN_SHIFT == 18, "as in largest_reaching of sampler.py");
  const u32 above_bin = ((end.key >> BIN_SHIFT) + 1) << BIN_SHIFT;
  return target < end.coarse_above ? draw_by_id(scratch, tokens, above_bin, exactly(target))
                                   : draw_in_order<ByWeight>(scratch, tokens, exactly(target));
}

// `tokens` by value: the caller's stay the whole vocabulary. A function of its own, for registers.
__device__ __noinline__ int choose(Scratch& scratch, Tokens tokens, const Row& row, Best best) {
  tokens.top = best.value;
  if (row.inverse_temperature == 0 || !isfinite(best.value)) return best.index;
  if (0 < row.top_k && row.top_k < tokens.count) return draw_of_top_k(scratch, tokens, row);
  if (row.top_p < 1) return draw_of_nucleus(scratch, tokens, row);
  return draw_by_id(scratch, tokens, 0, share(row.uniform));
}

// ---- changes of logits ----

// Set changes begin .. end of the row to what new_logit(old logit, change's value) says; they then hold the old logits.
template <class NewLogit> DEVICE void change(float* logits, Change* changes, int begin, int end, NewLogit new_logit) {
  for (int i = begin + threadIdx.x; i < end; i += SAMPLE_THREADS) {
    float& logit = logits[changes[i].token];
    float before = logit;
    logit = new_logit(before, changes[i].value);
    changes[i].value = __float_as_int(before);
  }
  __syncthreads();  // a token may be among the next changes, too
}

// In double precision where NumPy computes so.
DEVICE float penalized(float logit, int count, const Row& row) {
  logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
  return static_cast<float>(logit - (row.frequency_penalty * count + row.presence_penalty * (count > 0)));
}

DEVICE void apply_changes(float* logits, Change* changes, const Row& row) {
  change(logits, changes, row.biased, row.seen, [](float old, i32 bias) { return old + __int_as_float(bias); });
  change(logits, changes, row.seen, row.banned, [&](float old, i32 count) { return penalized(old, count, row); });
  change(logits, changes, row.banned, row.end, [](float, i32) { return -infinity(); });
}

DEVICE void undo_changes(float* logits, Change* changes, const Row& row) {
  auto old_logit = [](float, i32 old) { return __int_as_float(old); };
  change(logits, changes, row.banned, row.end, old_logit);
  change(logits, changes, row.seen, row.banned, old_logit);
  change(logits, changes, row.biased, row.seen, old_logit);
}

// ---- log-probabilities ----

// scratch.found: the ids of the `count` best tokens, in no particular order.
DEVICE void find_best(Scratch& scratch, Tokens& tokens, int count) {
  Cut last = select<ByLogit>(scratch, tokens, CountEach(), exactly(count - 1));
  __syncthreads();
  if (threadIdx.x == 0) scratch.count = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < tokens.count; i += SAMPLE_THREADS)
    if (ByLogit::key(tokens.logit(i), 0) > last.key) scratch.found[atomicAdd(&scratch.count, 1)] = tokens.id(i);
  for (int i = last.above; i < count; i++) {
    int id = nth_id<ByLogit>(scratch, tokens, last.key, i - last.above);
    if (threadIdx.x == 0) scratch.found[i] = id;
  }
  __syncthreads();
}

// The log-softmax of the best `count` of all tokens, best first, and of the chosen one.
DEVICE void write_logprobs(Scratch& scratch, Tokens tokens, int count, int chosen, i32* ids, float* best_logprobs,
                           float* chosen_logprob) {
  const float* logits = tokens.logits;
  auto mass = [&](int i) { return mass_of(tokens.weight(logits[i])); };
  const u64 sum = find(scratch, tokens.count, mass, exactly(0)).total;
  const double log_sum = tokens.top + log(sum / static_cast<double>(ONE));
  if (threadIdx.x == 0) *chosen_logprob = static_cast<float>(logits[chosen] - log_sum);
  if (count == 0) return;
  find_best(scratch, tokens, count);
  if (threadIdx.x >= count) return;
  const i32 id = scratch.found[threadIdx.x];
  int rank = 0;
  for (int i = 0; i < count; i++) {
    i32 other = scratch.found[i];
    rank += logits[other] > logits[id] || (logits[other] == logits[id] && other < id);
  }
  ids[rank] = id;
  best_logprobs[rank] = static_cast<float>(logits[id] - log_sum);
}

// ---- the kernel ----

// A token for each row of logits (rows, vocab), which are the same again afterwards. masks: (.., ceil(vocab / 32)), a
// bit for each token that is allowed. results: ids (rows,), raw maxima (rows,), the chosen tokens' log-probabilities
// (rows,), ids of the best tokens (rows, MAX_LOGPROBS), their log-probabilities (rows, MAX_LOGPROBS). Where the maximum
// is not finite, only it has a meaning.
DEVICE void sample(float* logits, const Row* rows, Change* changes, const u32* masks, i32* results, int vocab) {
  __shared__ Scratch scratch;
  const Row& row = rows[blockIdx.x];
  const int num_rows = gridDim.x, r = blockIdx.x;
  logits += i64(r) * vocab;
  Tokens raw = {logits, nullptr, vocab, 1, 0};
  const Best raw_best = best_of(raw);
  raw.top = raw_best.value;

  int chosen = raw_best.index;
  if (isfinite(raw_best.value)) {
    const u32* mask = row.mask < 0 ? nullptr : masks + i64(row.mask) * ((vocab + 31) / 32);
    Tokens tokens = {logits, mask, vocab, row.inverse_temperature, row.min_p};
    const bool is_changed = mask || row.biased < row.end;
    apply_changes(logits, changes, row);
    chosen = choose(scratch, tokens, row, is_changed ? best_of(tokens) : raw_best);
    __syncthreads();
    undo_changes(logits, changes, row);
    float* logprobs = reinterpret_cast<float*>(results) + 2 * num_rows;
    i32* best_ids = results + 3 * num_rows + r * MAX_LOGPROBS;
    float* best_logprobs = logprobs + num_rows * (1 + MAX_LOGPROBS) + r * MAX_LOGPROBS;
    if (row.num_logprobs >= 0)
      write_logprobs(scratch, raw, row.num_logprobs, chosen, best_ids, best_logprobs, logprobs + r);
  }
  if (threadIdx.x == 0) {
    results[r] = chosen;
    reinterpret_cast<float*>(results)[num_rows + r] = raw_best.value;
  }
}

}  // namespace sampling
