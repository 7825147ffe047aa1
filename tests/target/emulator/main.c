// Runs one compiled kernel in a process of its own, without the TVM runtime and without libc, which would take a
// minute to build.
//
// Standard input holds the arguments, one after the other: the DLPack type code, the bits of an element, the number of
// dimensions and the dimensions themselves, each an int64, then the elements. Standard output gets the elements of all
// arguments as the kernel leaves them.

#include <tvm/ffi/c_api.h>
#include <tvm/runtime/c_backend_api.h>

enum { MAX_ARGUMENTS = 16, MAX_DIMENSIONS = 8, ALIGNMENT = 64, TASKS = 3 };
enum { STDIN, STDOUT, STDERR };
enum { READ = 63, WRITE = 64, EXIT = 93 };  // Linux's numbers on aarch64

typedef struct {
  DLTensor tensor;
  int64_t shape[MAX_DIMENSIONS];
  int64_t strides[MAX_DIMENSIONS];
  size_t bytes;
} Argument;

int __tvm_ffi_main(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

static long system_call(long number, long first, const void* second, long third) {
  register long x8 __asm__("x8") = number;
  register long x0 __asm__("x0") = first;
  register const void* x1 __asm__("x1") = second;
  register long x2 __asm__("x2") = third;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
  return x0;
}

static _Noreturn void leave(int status) {
  system_call(EXIT, status, NULL, 0);
  __builtin_unreachable();
}

static void write_all(int file, const char* data, size_t bytes) {
  while (bytes) {
    long done = system_call(WRITE, file, data, bytes);
    if (done <= 0) leave(1);
    data += done;
    bytes -= done;
  }
}

static void print(const char* text) {
  size_t length = 0;
  while (text[length]) ++length;
  write_all(STDERR, text, length);
}

static _Noreturn void fail(const char* message) {
  print(message);
  leave(1);
}

// How many bytes there were before the end of the input, if fewer.
static size_t read_all(char* data, size_t bytes) {
  size_t total = 0;
  while (total < bytes) {
    long done = system_call(READ, STDIN, data + total, bytes - total);
    if (done < 0) fail("standard input cannot be read");
    if (done == 0) break;
    total += done;
  }
  return total;
}

// Nothing is freed: the process lives for one call of a kernel.
static void* allocate(size_t bytes) {
  static _Alignas(ALIGNMENT) char memory[256 << 20];
  static size_t used = 0;
  if (bytes > sizeof memory - used) fail("out of memory");
  void* data = memory + used;
  used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return data;
}

// What compiled kernels call: the functions as such, the rest through pointers, which a kernel defines weakly.

void* memset(void* data, int byte, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) ((char*)data)[i] = byte;
  return data;
}

void* memcpy(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) ((char*)to)[i] = ((const char*)from)[i];
  return to;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  print(kind);
  print(": ");
  for (int32_t i = 0; i < count; ++i) {
    if (parts[i]) print(parts[i]);
  }
}

// One task after the other: kernels that need no barrier mean the same, and run the same every time.
static int launch(FTVMParallelLambda task, void* data, int tasks) {
  TVMParallelGroupEnv group = {.num_task = tasks > 0 ? tasks : TASKS};
  for (int i = 0; i < group.num_task; ++i) {
    if (task(i, &group, data)) return -1;
  }
  return 0;
}

static void* allocate_workspace(int device, int id, uint64_t bytes, int type_code, int type_bits) {
  return allocate(bytes);
}

static int free_workspace(int device, int id, void* data) {
  return 0;
}

int (*__TVMBackendParallelLaunch)(FTVMParallelLambda, void*, int) = launch;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = free_workspace;

static void read_exactly(void* data, size_t bytes) {
  if (read_all(data, bytes) < bytes) fail("the arguments end early");
}

// False at the end of the input.
static int read_argument(Argument* argument) {
  struct {
    int64_t code, bits, dimensions;
  } header;
  if (!read_all((char*)&header, sizeof header)) return 0;
  if (header.dimensions > MAX_DIMENSIONS) fail("too many dimensions");
  read_exactly(argument->shape, header.dimensions * sizeof *argument->shape);
  int64_t elements = 1;
  for (int64_t i = header.dimensions - 1; i >= 0; --i) {
    argument->strides[i] = elements;
    elements *= argument->shape[i];
  }
  argument->bytes = elements * header.bits / 8;
  argument->tensor = (DLTensor){
      .data = allocate(argument->bytes),
      .device = {.device_type = kDLCPU},
      .ndim = header.dimensions,
      .dtype = {.code = header.code, .bits = header.bits, .lanes = 1},
      .shape = argument->shape,
      .strides = argument->strides,
  };
  read_exactly(argument->tensor.data, argument->bytes);
  return 1;
}

void _start(void) {
  static Argument arguments[MAX_ARGUMENTS];
  static TVMFFIAny packed[MAX_ARGUMENTS], result;
  int count = 0;
  while (count < MAX_ARGUMENTS && read_argument(&arguments[count])) {
    packed[count].type_index = kTVMFFIDLTensorPtr;
    packed[count].v_ptr = &arguments[count].tensor;
    ++count;
  }
  if (__tvm_ffi_main(NULL, packed, count, &result)) leave(1);
  for (int i = 0; i < count; ++i) {
    write_all(STDOUT, arguments[i].tensor.data, arguments[i].bytes);
  }
  leave(0);
}
