// What Python calls: `parameters_…` describes a kernel's, `launch_…` runs it.
#pragma once
#include "builtins.h"
#include "copies.h"

namespace emulator {

struct Argument {
  enum Kind { SCALAR, ARRAY, CONSTANT_ARRAY } kind;
  void* data;
  size_t bytes;
};

struct Launch {
  unsigned grid[3], block[3];
  size_t shared;
  int descending, seconds, argument_count;
  const Argument* arguments;
};

// A character for each parameter: p(ointer), f(loat), d(ouble), or an integer's bytes.
template <class T> constexpr char letter = '0' + sizeof(T);
template <class T> constexpr char letter<T*> = 'p';
template <> constexpr char letter<float> = 'f';
template <> constexpr char letter<double> = 'd';

template <class... P> const char* letters(void (*)(P...)) {
  static const char all[] = {letter<P>..., 0};
  return all;
}

template <class... P> void call(void (*kernel)(P...), void** arguments) {
  struct Call {
    Call(void (*kernel)(P...), P... values) { kernel(values...); }
  };
  Call{kernel, *static_cast<P*>(*arguments++)...};  // braces: in order
}

inline void run_grid() {
  unsigned count = gridDim.x * gridDim.y * gridDim.z;
  for (unsigned i = 0; i < count; i++) {
    blockIdx = position(in_order(i, count), gridDim);
    poison_shared();
    forget_copies();
    run_block();
    if (!dynamic_shared.intact()) fail("block (%u, %u, %u) wrote beyond its dynamic shared memory", blockIdx.x,
                                       blockIdx.y, blockIdx.z);
  }
}

// Arrays are copied to guarded memory; one given twice is in the same place.
inline void* place(const Argument* arguments, int i) {
  const Argument& argument = arguments[i];
  for (int j = 0; j < i; j++)
    if (arguments[j].kind != Argument::SCALAR && arguments[j].data == argument.data) return arrays[j].data;
  arrays[i] = Memory::allocate(argument.bytes, 16);
  memcpy(arrays[i].data, argument.data, argument.bytes);
  if (argument.kind == Argument::CONSTANT_ARRAY) arrays[i].forbid_writes();
  return arrays[i].data;
}

inline void run(const Launch& launch) {
  static void *pointers[MAX_ARGUMENTS], *values[MAX_ARGUMENTS];
  for (int i = 0; i < launch.argument_count; i++) {
    const Argument& argument = launch.arguments[i];
    if (argument.kind != Argument::SCALAR) pointers[i] = argument.data ? place(launch.arguments, i) : nullptr;
    values[i] = argument.kind == Argument::SCALAR ? argument.data : &pointers[i];
  }
  kernel_arguments = values;
  dynamic_shared = Memory::allocate(launch.shared, 1024);
  allocate_stacks();
  run_grid();
  for (int i = 0; i < launch.argument_count; i++) {
    if (arrays[i].pages && !arrays[i].intact()) fail("write outside argument %d", i);
    if (arrays[i].pages && launch.arguments[i].kind == Argument::ARRAY)
      memcpy(launch.arguments[i].data, arrays[i].data, arrays[i].bytes);
  }
}

inline const char* launch(const Launch& launch) {
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  thread_count = blockDim.x * blockDim.y * blockDim.z;
  descending = launch.descending;
  message[0] = 0;
  {
    Watch watch(launch.seconds);
    if (!_setjmp(failure)) run(launch);
  }
  current = nullptr;
  release_stacks();
  for (Memory& array : arrays) {
    if (array.pages) array.release();
    array = {};
  }
  if (dynamic_shared.pages) dynamic_shared.release();
  dynamic_shared = {};
  return message;
}

}  // namespace emulator

#define EMULATE(name)                                                                                     \
  extern "C" __attribute__((visibility("default"))) const char* parameters_##name() {                     \
    return emulator::letters(name);                                                                       \
  }                                                                                                       \
  extern "C" __attribute__((visibility("default"))) const char* launch_##name(const emulator::Launch& l) { \
    emulator::kernel = [](void** arguments) { emulator::call(name, arguments); };                         \
    return emulator::launch(l);                                                                           \
  }
