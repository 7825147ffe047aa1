// The threads of a block as fibers of one CPU thread. Each runs until it meets the others, at a barrier of the block
// or in an operation of its warp; then the next one runs, in ascending or descending order.
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;
constexpr int MAX_COPIES = 512;
constexpr size_t STACK = 64 << 10, PAGE = 4 << 10;

enum Status { READY, AT_WARP, AT_BLOCK, RETURNED };

// An asynchronous copy on its way: 16 bytes, or zeros where `from` is null.
struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Thread {
  ucontext_t start;  // until it runs for the first time in a block,
  jmp_buf state;     // and from then on: far quicker to switch to
  bool started;
  Status status;
  const char* where;  // it waits, for messages
  int index;
  dim3 position;
  int block_barriers, warp_barriers;  // so far: the same number for all threads that have passed one
  Copy copies[MAX_COPIES];
  int copy_count, groups;
};

struct Warp {
  alignas(16) unsigned char in[WARP][64], out[WARP][64];
  int arrived;
  void* work;  // what the lanes that have arrived are about to do
};

static Thread threads[MAX_THREADS];
static Warp warps[MAX_THREADS / WARP];
static Thread* current;  // null while no thread runs
static int thread_count;
static unsigned char* stacks;
static bool descending;
static void (*kernel)(void** arguments);
static void** kernel_arguments;

static jmp_buf scheduler, failure;
static char message[512];

// Abandons the launch; safe also on a thread's stack and in a signal handler.
[[noreturn]] inline void fail(const char* format, ...) {
  int used = 0;
  if (current)
    used = snprintf(message, sizeof message, "thread (%u, %u, %u) of block (%u, %u, %u): ", threadIdx.x, threadIdx.y,
                    threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + used, sizeof message - used, format, arguments);
  va_end(arguments);
  _longjmp(failure, 1);
}

inline dim3 position(unsigned index, dim3 size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

// One for each thread, with pages without access between them, so that an overflow is a fault.
inline void allocate_stacks() {
  size_t bytes = thread_count * (STACK + PAGE);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for stacks");
  stacks = static_cast<unsigned char*>(memory);
  for (int i = 0; i < thread_count; i++) mprotect(stacks + i * (STACK + PAGE), PAGE, PROT_NONE);
}
inline void release_stacks() {
  if (stacks) munmap(stacks, thread_count * (STACK + PAGE));
  stacks = nullptr;
}

// Back to the scheduler, until this thread is READY and its turn comes.
__attribute__((noinline)) inline void suspend(Status status, const char* where) {
  current->status = status;
  current->where = where;
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}

inline void thread_main() {
  kernel(kernel_arguments);
  suspend(RETURNED, "return");
}

__attribute__((noinline)) inline void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.position;
  if (!_setjmp(scheduler)) {
    if (thread.started) _longjmp(thread.state, 1);
    thread.started = true;
    setcontext(&thread.start);
  }
  current = nullptr;
}

inline void prepare(Thread& thread, int index) {
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = stacks + index * (STACK + PAGE) + PAGE;
  thread.start.uc_stack.ss_size = STACK;
  makecontext(&thread.start, thread_main, 0);
  thread.started = false;
  thread.status = READY;
  thread.index = index;
  thread.position = position(index, blockDim);
  thread.block_barriers = thread.warp_barriers = thread.copy_count = thread.groups = 0;
}

inline int in_order(int i, int count) { return descending ? count - 1 - i : i; }

// One turn for each thread of a warp. False if none was ready.
inline bool run_warp(int warp) {
  int first = warp * WARP, lanes = thread_count - first < WARP ? thread_count - first : WARP;
  bool ran = false;
  for (int i = 0; i < lanes; i++) {
    Thread& thread = threads[first + in_order(i, lanes)];
    if (thread.status != READY) continue;
    resume(thread);
    ran = true;
  }
  return ran;
}

inline bool all(Status status) {
  for (int i = 0; i < thread_count; i++)
    if (threads[i].status != status) return false;
  return true;
}

[[noreturn]] inline void fail_for_deadlock() {
  const Thread *waiting = nullptr, *other = nullptr;
  for (int i = 0; i < thread_count && !waiting; i++)
    if (threads[i].status != RETURNED) waiting = &threads[i];
  for (int i = 0; i < thread_count && !other; i++)
    if (threads[i].status != waiting->status) other = &threads[i];
  if (!other) fail("deadlock in block (%u, %u, %u): %s needs a whole warp", blockIdx.x, blockIdx.y, blockIdx.z,
                   waiting->where);
  fail("deadlock in block (%u, %u, %u): thread %d waits at %s, thread %d is at %s", blockIdx.x, blockIdx.y, blockIdx.z,
       waiting->index, waiting->where, other->index, other->where);
}

// Each warp runs as far as it can before the next: what it needs of the others without a barrier is then missing.
inline void run_block() {
  int warp_count = (thread_count + WARP - 1) / WARP;
  for (int i = 0; i < thread_count; i++) prepare(threads[i], i);
  for (int i = 0; i < warp_count; i++) warps[i].arrived = 0;
  while (!all(RETURNED)) {
    for (int i = 0; i < warp_count; i++)
      while (run_warp(in_order(i, warp_count))) {
      }
    if (all(AT_BLOCK))
      for (int i = 0; i < thread_count; i++) threads[i].status = READY;
    else if (!all(RETURNED))
      fail_for_deadlock();
  }
}

// What all lanes of a warp do at once: `work` turns their inputs to their outputs when the last one has arrived.
template <class In, class Out>
Out collective(const char* where, const In& in, void (*work)(const In (&)[WARP], Out (&)[WARP])) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "enlarge Warp");
  Warp& warp = warps[current->index / WARP];
  auto& inputs = *reinterpret_cast<In(*)[WARP]>(warp.in);
  auto& outputs = *reinterpret_cast<Out(*)[WARP]>(warp.out);
  int lane = current->index % WARP;
  Thread* lanes = current - lane;

  void* same = reinterpret_cast<void*>(work);
  if (warp.arrived && warp.work != same) fail("this lane is at %s, others of its warp are elsewhere", where);
  warp.work = same;
  inputs[lane] = in;
  if (++warp.arrived < WARP) {
    suspend(AT_WARP, where);
  } else {
    work(inputs, outputs);
    warp.arrived = 0;
    for (int i = 0; i < WARP; i++) lanes[i].status = READY;
    suspend(READY, where);  // so that the lanes go on in order
  }
  return outputs[lane];
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::current->block_barriers++;
  emulator::suspend(emulator::AT_BLOCK, "__syncthreads");
}
