// Memory in which mistakes show: it is NaN until written, and an access outside it is a fault.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/time.h>

#include "fibers.h"

// Static shared variables, next to each other (GCC leaves those of templates elsewhere); `used`, for unseen writes.
#define __shared__ static __attribute__((section("shared_memory"), used))
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_shared_memory[], __stop_shared_memory[];

namespace emulator {

constexpr int POISON = 0xff;  // a NaN as float, f16 and bf16
constexpr size_t GUARD = 16 << 20;

inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Bytes that end where accessible memory ends, or as near as their alignment allows.
struct Memory {
  unsigned char *data, *pages;
  size_t bytes, page_bytes;

  static Memory allocate(size_t bytes, size_t alignment) {
    size_t page_bytes = round_up(round_up(bytes, alignment), PAGE);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* all = mmap(nullptr, page_bytes + 2 * GUARD, PROT_NONE, flags, -1, 0);
    if (all == MAP_FAILED) fail("no memory for %zu bytes", bytes);
    unsigned char* pages = static_cast<unsigned char*>(all) + GUARD;
    mprotect(pages, page_bytes, PROT_READ | PROT_WRITE);
    memset(pages, POISON, page_bytes);
    return {pages + page_bytes - round_up(bytes, alignment), pages, bytes, page_bytes};
  }

  void release() { munmap(pages - GUARD, page_bytes + 2 * GUARD); }
  void forbid_writes() { mprotect(pages, page_bytes, PROT_READ); }
  void poison() { memset(data, POISON, bytes); }

  bool near(const void* address) const {
    auto* p = static_cast<const unsigned char*>(address);
    return p >= pages - GUARD && p < pages + page_bytes + GUARD;
  }
  bool contains(const void* address) const {
    auto* p = static_cast<const unsigned char*>(address);
    return p >= data && p < data + bytes;
  }

  // Nothing was written around the data, within its pages.
  bool intact() const {
    for (auto* p = pages; p < data; p++)
      if (*p != POISON) return false;
    for (auto* p = data + bytes; p < pages + page_bytes; p++)
      if (*p != POISON) return false;
    return true;
  }
};

constexpr int MAX_ARGUMENTS = 64;
static Memory arrays[MAX_ARGUMENTS];  // without pages where an argument is none, or the same as one before
static Memory dynamic_shared;
static pthread_t launcher;

inline void poison_shared() {
  dynamic_shared.poison();
  if (__start_shared_memory) memset(__start_shared_memory, POISON, __stop_shared_memory - __start_shared_memory);
}

// The argument in whose memory, or next to it, an address is; -1: none.
inline int argument_near(const void* address) {
  for (int i = 0; i < MAX_ARGUMENTS; i++)
    if (arrays[i].pages && arrays[i].near(address)) return i;
  return -1;
}

inline bool is_shared(const void* address) {
  bool is_static = address >= __start_shared_memory && address < __stop_shared_memory;
#ifndef __clang__
  is_static = is_static || (!dynamic_shared.near(address) && argument_near(address) < 0);
#endif
  return is_static || dynamic_shared.contains(address);
}

// For accesses of 16 bytes at once.
inline void check_aligned(const void* address, const char* where) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("misaligned address in %s", where);
}
inline void check_shared(const void* address, const char* where) {
  if (!is_shared(address)) fail("%s outside shared memory", where);
  check_aligned(address, where);
}

[[noreturn]] inline void fail_for_access(const unsigned char* address) {
  if (dynamic_shared.near(address))
    fail("access to byte %td of %zu bytes of dynamic shared memory", address - dynamic_shared.data,
         dynamic_shared.bytes);
  if (int i = argument_near(address); i >= 0) {
    const Memory& array = arrays[i];
    if (array.contains(address)) fail("write to argument %d, which is read-only", i);
    fail("access to byte %td of argument %d, which has %zu", address - array.data, i, array.bytes);
  }
  fail("access to invalid address %p, or stack overflow", static_cast<const void*>(address));
}

inline void on_signal(int signal, siginfo_t* information, void*) {
  if (!pthread_equal(pthread_self(), launcher)) {
    if (signal == SIGVTALRM)
      pthread_kill(launcher, signal);  // the timer's may reach any thread
    else
      ::signal(signal, SIG_DFL);  // not ours
    return;
  }
  if (signal == SIGVTALRM) fail("still running after the time limit: it may wait for another thread");
  bool misaligned = information->si_code == SI_KERNEL || signal == SIGBUS;  // x86 gives no address then
  if (signal == SIGSEGV && !misaligned) fail_for_access(static_cast<unsigned char*>(information->si_addr));
  if (signal == SIGFPE) fail("integer division by zero");
  fail("misaligned access, index outside an array, or unset bool");  // the checks that the compiler adds
}

// While it lives, faults and the end of the time limit abandon the launch.
struct Watch {
  static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGVTALRM};
  struct sigaction before[6];
  stack_t stack_before;
  alignas(16) unsigned char stack[64 << 10];  // a thread's may have overflowed

  explicit Watch(int seconds) {
    launcher = pthread_self();
    stack_t alternative = {};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, &stack_before);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return: leave it unblocked
    for (int i = 0; i < 6; i++) sigaction(SIGNALS[i], &action, &before[i]);
    set_timer(seconds);
  }
  ~Watch() {
    set_timer(0);
    for (int i = 0; i < 6; i++) sigaction(SIGNALS[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
  static void set_timer(int seconds) {  // of CPU time, so that a busy machine does not matter
    itimerval time = {};
    time.it_value.tv_sec = seconds;
    setitimer(ITIMER_VIRTUAL, &time, nullptr);
  }
};

}  // namespace emulator
