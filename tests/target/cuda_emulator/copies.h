// Asynchronous copies. The destination is lost at once and the data arrive as late as they may, so that a missing wait
// or barrier shows; and ldmatrix asks whether a barrier has made them visible to the whole warp.
#pragma once
#include "memory.h"

namespace emulator {

constexpr int MAX_SHARED = 227 << 10, CHUNK = 16;

// Who copied 16 bytes of dynamic shared memory, and how many barriers it had passed when they arrived.
struct Arrival {
  const Thread* by;
  int block_barriers, warp_barriers;
};
static Arrival arrivals[MAX_SHARED / CHUNK];

inline Arrival* arrival_at(const void* address) {
  return dynamic_shared.contains(address)
      ? &arrivals[(static_cast<const unsigned char*>(address) - dynamic_shared.data) / CHUNK]
      : nullptr;
}

inline void forget_copies() { memset(arrivals, 0, (dynamic_shared.bytes + CHUNK - 1) / CHUNK * sizeof(Arrival)); }

inline void start_copy(void* to, const void* from, bool valid) {
  check_shared(to, "copy_async");
  if (valid) check_aligned(from, "copy_async");
  if (current->copy_count == MAX_COPIES) fail("more than %d copies are on their way", MAX_COPIES);
  memset(to, POISON, CHUNK);
  current->copies[current->copy_count++] = {to, valid ? from : nullptr, current->groups};
}

inline void finish(const Copy& copy) {
  if (copy.from)
    memcpy(copy.to, copy.from, CHUNK);
  else
    memset(copy.to, 0, CHUNK);
  if (Arrival* arrival = arrival_at(copy.to)) *arrival = {current, current->block_barriers, current->warp_barriers};
}

// Groups up to and including `last` arrive.
inline void finish_copies(int last) {
  int rest = 0;
  for (int i = 0; i < current->copy_count; i++) {
    const Copy copy = current->copies[i];
    if (copy.group > last)
      current->copies[rest++] = copy;
    else
      finish(copy);
  }
  current->copy_count = rest;
}

// For reads by all lanes of the warp.
inline void check_visible(const void* address) {
  const Arrival* arrival = arrival_at(address);
  if (!arrival || !arrival->by || current->block_barriers > arrival->block_barriers) return;
  bool same_warp = arrival->by->index / WARP == current->index / WARP;
  if (same_warp && current->warp_barriers > arrival->warp_barriers) return;
  fail("ldmatrix of what thread %d copied, without a barrier after its wait", arrival->by->index);
}

}  // namespace emulator
