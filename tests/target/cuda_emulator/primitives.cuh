// The names of targets/cuda_kernels/primitives.cuh, which says what they mean, for a CPU. What a warp does as one is a
// function from all lanes' inputs to all lanes' outputs, which emulator::collective calls when the last lane arrives.
#pragma once
#include "builtins.h"
#include "copies.h"

using f16 = __half;
using bf16 = __nv_bfloat16;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

#define DEVICE inline
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared.data

constexpr int WARP = emulator::WARP;

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(f16 x) { return x; }
DEVICE float to_float(bf16 x) { return x; }

template <class T> DEVICE T from_float(float x) { return x; }

namespace emulator {
template <class T> struct Pair {
  T low, high;
};
}  // namespace emulator

template <class T> DEVICE u32 pack(float low, float high) {
  return emulator::bits<u32>(emulator::Pair<T>{low, high});
}
template <class T> DEVICE float2 unpack(u32 v) {
  auto pair = emulator::bits<emulator::Pair<T>>(v);
  return {pair.low, pair.high};
}

template <class T> DEVICE u32 fma_pair(u32 a, u32 b, u32 c) {
  float2 x = unpack<T>(a), y = unpack<T>(b), z = unpack<T>(c);
  return pack<T>(emulator::fma_to_odd(x.x, y.x, z.x), emulator::fma_to_odd(x.y, y.y, z.y));
}

namespace emulator {

struct Factors {
  float d[4];
  u32 a[4], b[2];
};
struct Product {
  float d[4];
};

// Sums are rounded once; a GPU's are less exact.
template <class T> void mma_warp(const Factors (&in)[WARP], Product (&out)[WARP]) {
  double a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < WARP; lane++) {
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
      float2 v = unpack<T>(in[lane].a[i]);
      int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
      a[row][column] = v.x, a[row][column + 1] = v.y;
    }
    for (int i = 0; i < 2; i++) {
      float2 v = unpack<T>(in[lane].b[i]);
      b[2 * t + 8 * i][g] = v.x, b[2 * t + 8 * i + 1][g] = v.y;
    }
    for (int i = 0; i < 4; i++) d[g + i / 2 * 8][2 * t + i % 2] = in[lane].d[i];
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < WARP; lane++)
    for (int i = 0; i < 4; i++)
      out[lane].d[i] = static_cast<float>(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
}

struct Row {
  const void* address;
};
struct Registers {
  u32 r[4];
};

template <bool transposed> void ldmatrix_warp(const Row (&in)[WARP], Registers (&out)[WARP]) {
  u16 matrices[4][8][8];
  for (int lane = 0; lane < WARP; lane++) {
    check_visible(in[lane].address);
    memcpy(matrices[lane / 8][lane % 8], in[lane].address, 16);
  }
  for (int lane = 0; lane < WARP; lane++)
    for (int i = 0; i < 4; i++) {
      auto& m = matrices[i];
      int row = lane / 4, column = lane % 4 * 2;
      u32 low = transposed ? m[column][row] : m[row][column];
      u32 high = transposed ? m[column + 1][row] : m[row][column + 1];
      out[lane].r[i] = low | high << 16;
    }
}

template <bool transposed> void ldmatrix(u32 (&r)[4], const void* row, const char* where) {
  check_shared(row, where);
  Registers registers = collective(where, Row{row}, ldmatrix_warp<transposed>);
  memcpy(r, registers.r, sizeof r);
}

template <class V> struct Wanted {
  V value;
  int lane;
};

template <class V> V shuffle(const char* where, V value, int lane) {
  return collective<Wanted<V>, V>(where, {value, lane}, [](const Wanted<V>(&in)[WARP], V(&out)[WARP]) {
    for (int i = 0; i < WARP; i++) out[i] = in[in[i].lane % WARP].value;
  });
}

}  // namespace emulator

template <class T> DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  emulator::Factors factors;
  memcpy(factors.d, d, sizeof d), memcpy(factors.a, a, sizeof a), memcpy(factors.b, b, sizeof b);
  emulator::Product product = emulator::collective("mma", factors, emulator::mma_warp<T>);
  memcpy(d, product.d, sizeof d);
}

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(reinterpret_cast<uintptr_t>(p)); }

DEVICE void ldmatrix(u32 (&r)[4], const void* row) { emulator::ldmatrix<false>(r, row, "ldmatrix"); }
DEVICE void ldmatrix_transposed(u32 (&r)[4], const void* row) {
  emulator::ldmatrix<true>(r, row, "ldmatrix_transposed");
}

DEVICE void copy_async(void* to_shared, const void* from, bool valid = true) {
  emulator::start_copy(to_shared, from, valid);
}
DEVICE void commit_copies() { emulator::current->groups++; }
template <int N> DEVICE void wait_copies() { emulator::finish_copies(emulator::current->groups - 1 - N); }

DEVICE uint4 load_once(const void* p) {
  emulator::check_aligned(p, "load_once");
  uint4 v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V> DEVICE V shuffle_xor(V v, int mask) {
  return emulator::shuffle("shuffle_xor", v, emulator::current->index % WARP ^ mask);
}
template <class V> DEVICE V shuffle(V v, int lane) { return emulator::shuffle("shuffle", v, lane); }
DEVICE void sync_warp() {
  emulator::current->warp_barriers++;
  emulator::collective<char, char>("sync_warp", 0, [](const char (&)[WARP], char (&)[WARP]) {});
}

DEVICE float warp_sum(float v) {
  for (int m = WARP / 2; m; m /= 2) v += shuffle_xor(v, m);
  return v;
}
DEVICE float warp_max(float v) {
  for (int m = WARP / 2; m; m /= 2) v = fmaxf(v, shuffle_xor(v, m));
  return v;
}

DEVICE float exp2_fast(float x) {
  constexpr float SMALLEST_NORMAL = 0x1p-126f;
  float y = exp2f(x);
  return y < SMALLEST_NORMAL ? 0 : y;
}

DEVICE void wait_for_previous() {}
DEVICE void let_next_start() {}

DEVICE u32 pick_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

DEVICE u32 subtract_pair_f16(u32 a, u32 b) {
  float2 x = unpack<f16>(a), y = unpack<f16>(b);
  return pack<f16>(x.x - y.x, x.y - y.y);
}

DEVICE bool arrives_last(u32* counter, u32 arrivals) { return atomicInc(counter, arrivals - 1) == arrivals - 1; }

DEVICE bool any_lane(bool v) {
  return emulator::collective<bool, bool>("any_lane", v, [](const bool (&in)[WARP], bool (&out)[WARP]) {
    bool any = false;
    for (bool v : in) any |= v;
    for (bool& v : out) v = any;
  });
}


namespace emulator {

// What lies in a bulk barrier's 8 bytes.
struct BulkBarrier {
  i32 bytes;  // expected, less those asked for
  u16 expects, phases;  // whether expect_bulk was called in this phase; how many ended
};

// Bulk copies arrive when somebody waits for them.
struct BulkCopy {
  void* to;
  const void* from;
  u32 bytes;
  u64* barrier;
};
static BulkCopy bulk_copies[4096];
static int bulk_copy_count;

template <class Each> void take_bulk_copies(u64* barrier, Each each) {
  int rest = 0;
  for (int i = 0; i < bulk_copy_count; i++) {
    if (bulk_copies[i].barrier == barrier)
      each(bulk_copies[i]);
    else
      bulk_copies[rest++] = bulk_copies[i];
  }
  bulk_copy_count = rest;
}

template <class Change> void change_bulk_barrier(u64* barrier, Change change) {
  BulkBarrier state = bits<BulkBarrier>(*barrier);
  change(state);
  if (state.expects && state.bytes == 0) state.expects = 0, state.phases++;
  *barrier = bits<u64>(state);
}

}  // namespace emulator

DEVICE void init_bulk_barrier(u64* barrier) {
  emulator::take_bulk_copies(barrier, [](const emulator::BulkCopy&) {});  // of a block before
  *barrier = 0;
}
DEVICE void expect_bulk(u64* barrier, u32 bytes) {
  emulator::change_bulk_barrier(barrier, [&](emulator::BulkBarrier& b) {
    if (b.expects) emulator::fail("expect_bulk twice in one phase");
    b.bytes += bytes, b.expects = 1;
  });
}
DEVICE void copy_bulk(void* to_shared, const void* from, u32 bytes, u64* barrier) {
  emulator::check_shared(to_shared, "copy_bulk");
  emulator::check_aligned(from, "copy_bulk");
  if (bytes % 16) emulator::fail("copy_bulk of %u bytes, which is no multiple of 16", bytes);
  if (emulator::bulk_copy_count == 4096) emulator::fail("too many bulk copies are on their way");
  memset(to_shared, emulator::POISON, bytes);
  emulator::bulk_copies[emulator::bulk_copy_count++] = {to_shared, from, bytes, barrier};
  emulator::change_bulk_barrier(barrier, [&](emulator::BulkBarrier& b) { b.bytes -= bytes; });
}
DEVICE void wait_bulk(u64* barrier, u32 parity) {
  if (emulator::bits<emulator::BulkBarrier>(*barrier).phases % 2 == parity)
    emulator::fail("wait_bulk for bytes that were not asked for, or more than were");
  emulator::take_bulk_copies(barrier, [](const emulator::BulkCopy& c) { memcpy(c.to, c.from, c.bytes); });
}
DEVICE bool one_lane() { return emulator::current->index % WARP == 0; }

DEVICE u32 and_or(u32 a, u32 mask, u32 c) { return a & mask | c; }
