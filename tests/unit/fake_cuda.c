// Stands in for libcuda.so.1 in tests without a GPU: the functions that mlcgen/runtime/cuda.py and driver_device.py
// use, by the driver's documentation. It is stricter than a driver, and for inspection it has functions of its own
// (fake_*).
//
// "Device memory" is host memory with a table of what was allocated. Streams are queues: what is put into one is done
// when somebody waits for it, no earlier, so that a missing wait shows; or as soon as it can (FAKE_CUDA_AHEAD). Kernels are done by a hook. An "image" is text,
// one word per function: name, or name(8,8,4) with sizes of parameters, or name(8)+1024 with static shared memory.
// The image "*" has every function.

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  ILLEGAL_ADDRESS = 700,
  NOT_SUPPORTED = 801,
  DRIVER_MISMATCH = 803,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURED_EVENT = 907,
};

static const struct {
  int code;
  const char *name;
} errors[] = {
    {SUCCESS, "CUDA_SUCCESS"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
    {DRIVER_MISMATCH, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT"},
};

// Everything that has a handle is in one list.
enum Kind { MEMORY, PINNED, STREAM, EVENT, MODULE, FUNCTION, GRAPH, EXECUTABLE, KINDS };
static const char *const kinds[KINDS] = {"memory", "pinned", "stream",   "event",
                                         "module", "function", "graph", "executable"};

typedef struct Op {
  enum { COPY, SET, KERNEL, RECORD, WAIT } what;
  char *to;
  const char *from;
  unsigned char *staged;  // the content of pageable memory when the copy was started
  size_t bytes;
  int value;
  struct Object *object;  // the function, or the event
  int serial;             // of the record that a wait is for
  unsigned grid[3], block;
  unsigned char *args;
  size_t args_bytes;
  struct Op *next;
} Op;

typedef struct Object {
  enum Kind kind;
  struct Object *next;
  char *base;  // memory; a module's image; a function's name
  size_t bytes;
  Op *first, *last;         // a stream's queue; a graph's content
  struct Object *graph;     // a stream that is being captured into it
  int is_first;             // a stream that was made when there was no other
  int invalid;              // a stream whose capture went wrong
  struct Object *on;        // an event's stream; a function's module
  int pending, captured;    // an event: how often it is in the queue
  int recorded, passed;     // how often it was recorded, and how often that was reached
  int num_params, size[32]; // a function; -1: not told
  int static_shared, max_dynamic;
} Object;

typedef struct {
  int id;
  int pad;
  union {
    char bytes[64];
    int overlaps;
    uint64_t align;
  } value;
} Attribute;

typedef struct {
  unsigned grid[3], block[3], shared;
  Object *stream;
  Attribute *attributes;
  unsigned num_attributes;
} Config;

typedef struct {
  size_t x, y, z, lod;  // 0 in this fake
  unsigned type;        // 1: the host's memory, 2: the device's
  char *host;
  uint64_t device;
  void *array, *reserved;
  size_t pitch, height;
} Side;

typedef struct {
  Side from, to;
  size_t width, height, depth;
} Copy3D;

_Static_assert(sizeof(Copy3D) == 200 && offsetof(Copy3D, to) == 88, "as in cuda.h");
_Static_assert(sizeof(Attribute) == 72 && offsetof(Attribute, value) == 8, "as in cuda.h");
_Static_assert(sizeof(Config) == 56 && offsetof(Config, stream) == 32, "as in cuda.h");

static Object *objects;
static size_t used;
static int initialized, retained, broken;
static char context[1];
static __thread int current;  // the generation of the context that this thread has, 0: none
static int generation = 1;
static char *log_text;
static size_t log_bytes;
static char fail_name[64];
static int fail_in, fail_code;
typedef void Hook(const char *name, const unsigned *grid, unsigned block, const unsigned char *args, size_t bytes);
static Hook *hook;

static void note(const char *format, ...) {
  char line[1024];
  va_list args;
  va_start(args, format);
  int size = vsnprintf(line, sizeof line, format, args);
  va_end(args);
  if (size >= (int)sizeof line) size = sizeof line - 1;
  log_text = realloc(log_text, log_bytes + size + 2);
  memcpy(log_text + log_bytes, line, size);
  memcpy(log_text + log_bytes + size, "\n", 2);
  log_bytes += size + 1;
}

static long long setting(const char *name, long long otherwise) {
  const char *text = getenv(name);
  return text && *text ? atoll(text) : otherwise;
}

static int arch(void) { return (int)setting("FAKE_CUDA_ARCH", 90); }
static size_t limit(void) { return (size_t)setting("FAKE_CUDA_MEMORY", 1 << 30); }
static int count(void) { return (int)setting("FAKE_CUDA_DEVICES", 1); }

static int shared_optin(void) {
  switch (arch()) {
    case 75: return 64 << 10;
    case 80: case 87: return 163 << 10;
    case 86: case 89: case 120: case 121: return 99 << 10;
    default: return 227 << 10;
  }
}

static int injected(const char *name) {
  if (strcmp(name, fail_name) || --fail_in) return SUCCESS;
  fail_name[0] = 0;
  return fail_code;
}

// At the start of each function: the log, what the test wants to fail, and what every call needs.
static int enter(const char *name, int needs_context) {
  int code = injected(name);
  if (code) return code;
  if (!initialized) return NOT_INITIALIZED;
  if (!needs_context) return SUCCESS;
  if (!retained || current != generation) return INVALID_CONTEXT;
  return broken;
}

#define ENTER(needs_context, ...)                    \
  do {                                               \
    note(__VA_ARGS__);                               \
    int code_ = enter(__func__, needs_context);      \
    if (code_) return code_;                         \
  } while (0)

#define REQUIRE(condition, code) \
  do {                           \
    if (!(condition)) return code; \
  } while (0)

static Object *add(enum Kind kind) {
  Object *object = calloc(1, sizeof *object);
  object->kind = kind;
  object->next = objects;
  return objects = object;
}

static int is_live(enum Kind kind, const Object *handle) {
  for (Object *o = objects; o; o = o->next)
    if (o == handle && o->kind == kind) return 1;
  return 0;
}

// The allocation in which all of these bytes are.
static Object *holding(enum Kind kind, const char *address, size_t bytes) {
  for (Object *o = objects; o; o = o->next)
    if (o->kind == kind && address >= o->base && address < o->base + o->bytes)
      return bytes <= (size_t)(o->base + o->bytes - address) ? o : NULL;
  return NULL;
}

static int touches_pinned(const char *address, size_t bytes) {
  for (Object *o = objects; o; o = o->next)
    if (o->kind == PINNED && address < o->base + o->bytes && o->base < address + bytes) return 1;
  return 0;
}

static void drop_op(Op *op) {
  free(op->staged);
  free(op->args);
  free(op);
}

static void drop_ops(Object *object) {
  for (Op *op = object->first; op;) {
    Op *next = op->next;
    drop_op(op);
    op = next;
  }
  object->first = object->last = NULL;
}

static void drop(Object *object) {
  Object **at = &objects;
  while (*at != object) at = &(*at)->next;
  *at = object->next;
  drop_ops(object);
  if (object->kind == MEMORY) used -= object->bytes;
  if (object->base) {
    memset(object->base, 0xDD, object->bytes);  // who uses it still shall not find what was there
    free(object->base);
  }
  free(object);
}

static void append(Object *object, const Op *from) {
  Op *op = malloc(sizeof *op);
  *op = *from;
  op->next = NULL;
  if (from->args) memcpy(op->args = malloc(from->args_bytes), from->args, from->args_bytes);
  if (object->last) object->last->next = op;
  else object->first = op;
  object->last = op;
}

static int exists(const char *address, size_t bytes) {
  return holding(MEMORY, address, bytes) || holding(PINNED, address, bytes);
}

static int must_wait(const Op *op) {
  return op->what == WAIT && is_live(EVENT, op->object) && op->object->passed < op->serial;
}

static int run(Op *op) {
  switch (op->what) {
    case COPY:
      REQUIRE(exists(op->to, op->bytes) && (op->staged || exists(op->from, op->bytes)), ILLEGAL_ADDRESS);
      memmove(op->to, op->staged ? (char *)op->staged : op->from, op->bytes);
      break;
    case SET:
      REQUIRE(exists(op->to, op->bytes), ILLEGAL_ADDRESS);
      memset(op->to, op->value, op->bytes);
      break;
    case KERNEL:
      REQUIRE(is_live(FUNCTION, op->object), ILLEGAL_ADDRESS);
      note("run %s", op->object->base);
      if (hook) hook(op->object->base, op->grid, op->block, op->args, op->args_bytes);
      break;
    case RECORD:
      if (is_live(EVENT, op->object)) op->object->pending--, op->object->passed++;
      break;
    case WAIT:
      break;
  }
  return SUCCESS;
}

static int drain(Object *stream, const Object *until, int serial);

static void run_first(Object *stream) {
  Op *op = stream->first;
  if (must_wait(op)) {  // it stays in the queue, or others would run ahead of it
    drain(op->object->on, op->object, op->serial);
    return;
  }
  stream->first = op->next;
  if (!stream->first) stream->last = NULL;
  if (!broken) broken = run(op);
  drop_op(op);
}

// With FAKE_CUDA_AHEAD all streams but the first made do what they can at once: what has to wait must be told so.
static void run_ahead(void) {
  static int busy;
  if (busy || !setting("FAKE_CUDA_AHEAD", 0)) return;
  busy = 1;
  for (Object *o = objects; o; o = o->next)
    if (o->kind == STREAM && !o->is_first)
      while (o->first && !must_wait(o->first)) run_first(o);
  busy = 0;
}

// Do what is in the queue; with an event, no more than what was before it was recorded for the n-th time.
static int drain(Object *stream, const Object *until, int serial) {
  while (stream->first && !(until && until->passed >= serial)) {
    run_first(stream);
    run_ahead();
  }
  return broken;
}

static void drain_all(void) {
  for (Object *o = objects; o; o = o->next)
    if (o->kind == STREAM) drain(o, NULL, 0);
}

static int start(Object *stream, const Op *op) {
  append(stream->graph ? stream->graph : stream, op);
  run_ahead();
  return SUCCESS;
}

static int not_in_capture(Object *stream) {
  stream->invalid = 1;
  return CAPTURE_UNSUPPORTED;
}

// The driver's functions

int cuGetErrorName(int code, const char **name) {
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].code == code) return *name = errors[i].name, SUCCESS;
  *name = NULL;
  return INVALID_VALUE;
}

int cuInit(unsigned flags) {
  note("cuInit %u", flags);
  int code = injected(__func__);
  if (code) return code;
  REQUIRE(flags == 0, INVALID_VALUE);
  REQUIRE(count() > 0, NO_DEVICE);
  initialized = 1;
  return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
  ENTER(0, "cuDeviceGet %d", ordinal);
  REQUIRE(ordinal >= 0 && ordinal < count(), INVALID_DEVICE);
  *device = ordinal;
  return SUCCESS;
}

int cuDeviceGetName(char *name, int size, int device) {
  ENTER(0, "cuDeviceGetName %d", device);
  REQUIRE(device >= 0 && device < count(), INVALID_DEVICE);
  snprintf(name, size, "Fake GPU %d", arch());
  return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  ENTER(0, "cuDeviceGetAttribute %d", attribute);
  REQUIRE(device >= 0 && device < count(), INVALID_DEVICE);
  switch (attribute) {
    case 16: *value = 132; break;
    case 75: *value = arch() / 10; break;
    case 76: *value = arch() % 10; break;
    case 97: *value = shared_optin(); break;
    default: return INVALID_VALUE;
  }
  return SUCCESS;
}

int cuDriverGetVersion(int *version) {
  ENTER(0, "cuDriverGetVersion");
  *version = (int)setting("FAKE_CUDA_VERSION", 13000);
  return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **result, int device) {
  ENTER(0, "cuDevicePrimaryCtxRetain %d", device);
  REQUIRE(device >= 0 && device < count(), INVALID_DEVICE);
  retained++;
  *result = context;
  return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER(0, "cuDevicePrimaryCtxRelease_v2 %d", device);
  REQUIRE(device >= 0 && device < count(), INVALID_DEVICE);
  REQUIRE(retained > 0, INVALID_CONTEXT);
  if (!--retained) {  // all that belongs to the context goes with it
    for (int kind = 0; kind < KINDS; kind++) {
      int left = 0;
      for (Object *o = objects; o; o = o->next) left += (int)o->kind == kind;
      if (left && kind != FUNCTION) note("left: %d %s", left, kinds[kind]);
    }
    while (objects) drop(objects);
    generation++;
    broken = 0;
  }
  return SUCCESS;
}

int cuCtxSetCurrent(void *wanted) {
  ENTER(0, "cuCtxSetCurrent");
  REQUIRE(wanted == context && retained, INVALID_CONTEXT);
  current = generation;
  return SUCCESS;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  ENTER(1, "cuMemGetInfo_v2");
  *total = limit();
  *free_bytes = used < limit() ? limit() - used : 0;
  return SUCCESS;
}

static char *take(enum Kind kind, size_t bytes) {
  void *base;
  if (posix_memalign(&base, kind == MEMORY ? 256 : 4096, bytes)) return NULL;
  Object *object = add(kind);
  object->base = base;
  object->bytes = bytes;
  memset(base, 0xAB, bytes);  // not zero: a driver promises nothing
  return base;
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  ENTER(1, "cuMemAlloc_v2 %zu", bytes);
  REQUIRE(bytes > 0, INVALID_VALUE);
  REQUIRE(bytes <= limit() && used + bytes <= limit(), OUT_OF_MEMORY);
  char *base = take(MEMORY, bytes);
  REQUIRE(base, OUT_OF_MEMORY);
  used += bytes;
  *address = (uint64_t)(uintptr_t)base;
  return SUCCESS;
}

static int give_back(enum Kind kind, char *address) {
  Object *object = holding(kind, address, 1);
  REQUIRE(object && object->base == address, INVALID_VALUE);
  drain_all();
  drop(object);
  return broken;
}

int cuMemFree_v2(uint64_t address) {
  ENTER(1, "cuMemFree_v2");
  return give_back(MEMORY, (char *)(uintptr_t)address);
}

int cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  ENTER(1, "cuMemHostAlloc %zu %u", bytes, flags);
  REQUIRE(bytes > 0 && flags <= 7, INVALID_VALUE);
  *pointer = take(PINNED, bytes);
  return *pointer ? SUCCESS : OUT_OF_MEMORY;
}

int cuMemFreeHost(void *pointer) {
  ENTER(1, "cuMemFreeHost");
  return give_back(PINNED, pointer);
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, Object *stream) {
  ENTER(1, "cuMemcpyHtoDAsync_v2 %zu", bytes);
  REQUIRE(is_live(STREAM, stream), INVALID_HANDLE);
  REQUIRE(holding(MEMORY, (char *)(uintptr_t)to, bytes) && from, INVALID_VALUE);
  Op op = {.what = COPY, .to = (char *)(uintptr_t)to, .from = from, .bytes = bytes};
  if (!holding(PINNED, from, bytes)) {
    REQUIRE(!touches_pinned(from, bytes), INVALID_VALUE);
    if (stream->graph) return not_in_capture(stream);
    memcpy(op.staged = malloc(bytes), from, bytes);
  }
  return start(stream, &op);
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, Object *stream) {
  ENTER(1, "cuMemcpyDtoHAsync_v2 %zu", bytes);
  REQUIRE(is_live(STREAM, stream), INVALID_HANDLE);
  REQUIRE(holding(MEMORY, (char *)(uintptr_t)from, bytes) && to, INVALID_VALUE);
  Op op = {.what = COPY, .to = to, .from = (char *)(uintptr_t)from, .bytes = bytes};
  if (holding(PINNED, to, bytes)) return start(stream, &op);
  REQUIRE(!touches_pinned(to, bytes), INVALID_VALUE);
  if (stream->graph) return not_in_capture(stream);
  int code = drain(stream, NULL, 0);  // to pageable memory it waits
  if (!code) memcpy(to, op.from, bytes);
  return code;
}

static char *place(const Side *side, size_t y, size_t z) {
  char *base = side->type == 1 ? side->host : (char *)(uintptr_t)side->device;
  return base + (z * side->height + y) * side->pitch;
}

int cuMemcpy3DAsync_v2(const Copy3D *copy, Object *stream) {
  ENTER(1, "cuMemcpy3DAsync_v2 %zu %zu %zu", copy->width, copy->height, copy->depth);
  const Side *from = &copy->from, *to = &copy->to;
  REQUIRE(is_live(STREAM, stream), INVALID_HANDLE);
  REQUIRE((from->type == 1 && to->type == 2) || (from->type == 2 && to->type == 1), INVALID_VALUE);
  REQUIRE(from->pitch >= copy->width && to->pitch >= copy->width, INVALID_VALUE);
  REQUIRE(from->pitch < 1u << 31 && to->pitch < 1u << 31, INVALID_VALUE);
  REQUIRE(from->height >= copy->height && to->height >= copy->height, INVALID_VALUE);
  for (size_t z = 0; z < copy->depth; z++)
    for (size_t y = 0; y < copy->height; y++) {
      Op op = {.what = COPY, .to = place(to, y, z), .from = place(from, y, z), .bytes = copy->width};
      const char *host = to->type == 1 ? op.to : op.from, *device = to->type == 1 ? op.from : op.to;
      REQUIRE(holding(MEMORY, device, op.bytes), INVALID_VALUE);
      REQUIRE(holding(PINNED, host, op.bytes), INVALID_VALUE);  // no pageable memory in this fake
      int code = start(stream, &op);
      if (code) return code;
    }
  return SUCCESS;
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Object *stream) {
  ENTER(1, "cuMemcpyDtoDAsync_v2 %zu", bytes);
  REQUIRE(is_live(STREAM, stream), INVALID_HANDLE);
  Op op = {.what = COPY, .to = (char *)(uintptr_t)to, .from = (char *)(uintptr_t)from, .bytes = bytes};
  REQUIRE(holding(MEMORY, op.to, bytes) && holding(MEMORY, op.from, bytes), INVALID_VALUE);
  return start(stream, &op);
}

int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, Object *stream) {
  ENTER(1, "cuMemsetD8Async %d %zu", value, bytes);
  REQUIRE(is_live(STREAM, stream), INVALID_HANDLE);
  Op op = {.what = SET, .to = (char *)(uintptr_t)to, .bytes = bytes, .value = value};
  REQUIRE(holding(MEMORY, op.to, bytes), INVALID_VALUE);
  return start(stream, &op);
}

int cuStreamCreate(Object **stream, unsigned flags) {
  ENTER(1, "cuStreamCreate %u", flags);
  REQUIRE(flags <= 1, INVALID_VALUE);
  int is_first = 1;
  for (Object *o = objects; o; o = o->next) is_first &= o->kind != STREAM;
  *stream = add(STREAM);
  (*stream)->is_first = is_first;
  return SUCCESS;
}

int cuStreamDestroy_v2(Object *stream) {
  ENTER(1, "cuStreamDestroy_v2");
  REQUIRE(is_live(STREAM, stream), INVALID_HANDLE);
  drain(stream, NULL, 0);
  drop(stream);
  return SUCCESS;
}

int cuStreamSynchronize(Object *stream) {
  ENTER(1, "cuStreamSynchronize");
  REQUIRE(is_live(STREAM, stream), INVALID_HANDLE);
  if (stream->graph) return not_in_capture(stream);
  return drain(stream, NULL, 0);
}

int cuStreamBeginCapture_v2(Object *stream, int mode) {
  ENTER(1, "cuStreamBeginCapture_v2 %d", mode);
  REQUIRE(is_live(STREAM, stream), INVALID_HANDLE);
  REQUIRE(mode >= 0 && mode <= 2 && !stream->graph, INVALID_VALUE);
  stream->graph = add(GRAPH);
  stream->invalid = 0;
  return SUCCESS;
}

int cuStreamEndCapture(Object *stream, Object **graph) {
  ENTER(1, "cuStreamEndCapture");
  REQUIRE(is_live(STREAM, stream), INVALID_HANDLE);
  REQUIRE(stream->graph, INVALID_VALUE);
  *graph = stream->graph;
  stream->graph = NULL;
  if (!stream->invalid) return SUCCESS;
  drop(*graph);
  *graph = NULL;
  return CAPTURE_INVALIDATED;
}

int cuGraphInstantiateWithFlags(Object **executable, Object *graph, uint64_t flags) {
  ENTER(1, "cuGraphInstantiateWithFlags %llu", (unsigned long long)flags);
  REQUIRE(is_live(GRAPH, graph), INVALID_HANDLE);
  REQUIRE(flags == 0, INVALID_VALUE);
  *executable = add(EXECUTABLE);
  for (Op *op = graph->first; op; op = op->next) append(*executable, op);
  return SUCCESS;
}

int cuGraphLaunch(Object *executable, Object *stream) {
  ENTER(1, "cuGraphLaunch");
  REQUIRE(is_live(EXECUTABLE, executable) && is_live(STREAM, stream), INVALID_HANDLE);
  if (stream->graph) return not_in_capture(stream);
  for (Op *op = executable->first; op; op = op->next) append(stream, op);
  return SUCCESS;
}

int cuGraphDestroy(Object *graph) {
  ENTER(1, "cuGraphDestroy");
  REQUIRE(is_live(GRAPH, graph), INVALID_HANDLE);
  drop(graph);
  return SUCCESS;
}

int cuGraphExecDestroy(Object *executable) {
  ENTER(1, "cuGraphExecDestroy");
  REQUIRE(is_live(EXECUTABLE, executable), INVALID_HANDLE);
  drop(executable);
  return SUCCESS;
}

int cuEventCreate(Object **event, unsigned flags) {
  ENTER(1, "cuEventCreate %u", flags);
  REQUIRE(flags <= 7, INVALID_VALUE);
  *event = add(EVENT);
  return SUCCESS;
}

int cuEventRecord(Object *event, Object *stream) {
  ENTER(1, "cuEventRecord");
  REQUIRE(is_live(EVENT, event) && is_live(STREAM, stream), INVALID_HANDLE);
  event->on = stream;
  event->captured = stream->graph != NULL;
  if (event->captured) return SUCCESS;
  Op op = {.what = RECORD, .object = event};
  event->pending++;
  event->recorded++;
  return start(stream, &op);
}

int cuStreamWaitEvent(Object *stream, Object *event, unsigned flags) {
  ENTER(1, "cuStreamWaitEvent %u", flags);
  REQUIRE(is_live(STREAM, stream) && is_live(EVENT, event), INVALID_HANDLE);
  REQUIRE(flags <= 1, INVALID_VALUE);
  if (stream->graph || event->captured) return not_in_capture(stream);  // no such edges in this fake's graphs
  Op op = {.what = WAIT, .object = event, .serial = event->recorded};
  return start(stream, &op);
}

int cuEventSynchronize(Object *event) {
  ENTER(1, "cuEventSynchronize");
  REQUIRE(is_live(EVENT, event), INVALID_HANDLE);
  REQUIRE(!event->captured, CAPTURED_EVENT);
  return event->pending ? drain(event->on, event, event->recorded) : SUCCESS;
}

int cuEventDestroy_v2(Object *event) {
  ENTER(1, "cuEventDestroy_v2");
  REQUIRE(is_live(EVENT, event), INVALID_HANDLE);
  drop(event);
  return SUCCESS;
}

int cuModuleLoadData(Object **module, const char *image) {
  ENTER(1, "cuModuleLoadData");
  REQUIRE(image, INVALID_VALUE);
  REQUIRE(*image, INVALID_IMAGE);
  *module = add(MODULE);
  (*module)->base = strdup(image);
  return SUCCESS;
}

int cuModuleUnload(Object *module) {
  ENTER(1, "cuModuleUnload");
  REQUIRE(is_live(MODULE, module), INVALID_HANDLE);
  for (Object *o = objects, *next; o; o = next) {
    next = o->next;
    if (o->kind == FUNCTION && o->on == module) drop(o);
  }
  drop(module);
  return SUCCESS;
}

int cuModuleGetFunction(Object **function, Object *module, const char *name) {
  ENTER(1, "cuModuleGetFunction %s", name);
  REQUIRE(is_live(MODULE, module), INVALID_HANDLE);
  size_t length = strlen(name);
  const char *at = module->base;
  for (; strcmp(at, "*"); at++) {
    at = strstr(at, name);
    REQUIRE(at && length, NOT_FOUND);
    if ((at == module->base || at[-1] == ' ') && strchr("(+ ", at[length])) break;  // strchr finds the end, too
  }
  Object *found = add(FUNCTION);
  found->on = module;
  found->base = strdup(name);
  found->bytes = length;
  found->num_params = -1;
  char *rest = (char *)at + (strcmp(at, "*") ? length : 1);
  if (*rest == '(') {
    for (found->num_params = 0, rest++; *rest != ')';) {
      found->size[found->num_params++] = (int)strtol(rest, &rest, 10);
      rest += *rest == ',';
    }
    rest++;
  }
  if (*rest == '+') found->static_shared = atoi(rest + 1);
  found->max_dynamic = (48 << 10) - found->static_shared;
  *function = found;
  return SUCCESS;
}

int cuFuncGetAttribute(int *value, int attribute, Object *function) {
  ENTER(1, "cuFuncGetAttribute %d", attribute);
  REQUIRE(is_live(FUNCTION, function), INVALID_HANDLE);
  REQUIRE(attribute == 1 || attribute == 8, INVALID_VALUE);
  *value = attribute == 1 ? function->static_shared : function->max_dynamic;
  return SUCCESS;
}

int cuFuncSetAttribute(Object *function, int attribute, int value) {
  ENTER(1, "cuFuncSetAttribute %d %d", attribute, value);
  REQUIRE(is_live(FUNCTION, function), INVALID_HANDLE);
  if (attribute == 9) return value >= -1 && value <= 100 ? SUCCESS : INVALID_VALUE;  // a wish, in percent
  REQUIRE(attribute == 8 && value >= 0 && value + function->static_shared <= shared_optin(), INVALID_VALUE);
  function->max_dynamic = value;
  return SUCCESS;
}

int cuLaunchKernelEx(const Config *config, Object *function, void **params, void **extra) {
  ENTER(1, "cuLaunchKernelEx");
  const Config c = *config;
  REQUIRE(is_live(FUNCTION, function) && is_live(STREAM, c.stream), INVALID_HANDLE);
  REQUIRE(c.grid[0] && c.grid[1] && c.grid[2] && c.block[0] && c.block[1] && c.block[2], INVALID_VALUE);
  REQUIRE(c.grid[0] <= 0x7fffffff && c.grid[1] <= 65535 && c.grid[2] <= 65535, INVALID_VALUE);
  REQUIRE(c.block[0] <= 1024 && c.block[1] <= 1024 && c.block[2] <= 64, INVALID_VALUE);
  REQUIRE(c.block[0] * c.block[1] * c.block[2] <= 1024, INVALID_VALUE);
  REQUIRE(c.shared <= (unsigned)function->max_dynamic, INVALID_VALUE);
  REQUIRE(!extra && (c.attributes || !c.num_attributes), INVALID_VALUE);
  char attributes[256] = "", args[600] = "";
  for (unsigned i = 0, end = 0; i < c.num_attributes && end < sizeof attributes; i++) {
    REQUIRE(c.attributes[i].id == 6 && (unsigned)c.attributes[i].value.overlaps <= 1, INVALID_VALUE);
    end += snprintf(attributes + end, sizeof attributes - end, " %d=%d", c.attributes[i].id,
                    c.attributes[i].value.overlaps);
  }
  Op op = {.what = KERNEL, .object = function, .block = c.block[0] * c.block[1] * c.block[2]};
  memcpy(op.grid, c.grid, sizeof op.grid);
  for (int i = 0; i < function->num_params; i++) op.args_bytes += function->size[i];
  unsigned char packed[4096];
  REQUIRE(op.args_bytes <= sizeof packed, INVALID_VALUE);
  size_t at = 0, end = 0;
  for (int i = 0; i < function->num_params; i++) {
    REQUIRE(params && params[i], INVALID_VALUE);
    memcpy(packed + at, params[i], function->size[i]);
    at += function->size[i];
    end += snprintf(args + end, sizeof args - end, " %d", function->size[i]);
  }
  op.args = packed;
  note("launch %s grid %u %u %u block %u %u %u shared %u attributes%s; args%s", function->base, c.grid[0], c.grid[1],
       c.grid[2], c.block[0], c.block[1], c.block[2], c.shared, attributes, function->num_params < 0 ? " ?" : args);
  return start(c.stream, &op);
}

int cuTensorMapEncodeTiled(void *map, int dtype, unsigned rank, void *address, const uint64_t *dims,
                           const uint64_t *strides, const unsigned *box, const unsigned *steps, int interleave,
                           int swizzle, int promotion, int fill) {
  ENTER(0, "cuTensorMapEncodeTiled");
  static const int sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned widths[] = {0xffffffff, 32, 64, 128};  // of a box, by its swizzle
  REQUIRE(arch() >= 90, NOT_SUPPORTED);
  REQUIRE(map && (uintptr_t)map % 64 == 0, INVALID_VALUE);
  REQUIRE(dtype >= 0 && dtype <= 12 && rank >= 1 && rank <= 5, INVALID_VALUE);
  REQUIRE(address && (uintptr_t)address % 16 == 0, INVALID_VALUE);
  REQUIRE(interleave == 0 && swizzle >= 0 && swizzle <= 3, INVALID_VALUE);  // no interleaving in this fake
  REQUIRE(promotion >= 0 && promotion <= 3 && fill >= 0 && fill <= 1, INVALID_VALUE);
  for (unsigned i = 0; i < rank; i++) {
    REQUIRE(dims[i] >= 1 && dims[i] <= 1ull << 32, INVALID_VALUE);
    REQUIRE(box[i] >= 1 && box[i] <= 256 && steps[i] >= 1 && steps[i] <= 8, INVALID_VALUE);
    if (i + 1 < rank) REQUIRE(strides[i] % 16 == 0 && strides[i] < 1ull << 40, INVALID_VALUE);
  }
  unsigned row = box[0] * sizes[dtype];
  REQUIRE(row % 16 == 0 && row <= widths[swizzle], INVALID_VALUE);
  // What the test reads back from the map: 16 numbers.
  uint64_t told[16] = {(uintptr_t)address, dtype, rank, swizzle, promotion};
  for (unsigned i = 0; i < rank; i++) {
    told[5 + i] = dims[i];
    told[10 + i] = box[i];
  }
  told[15] = rank > 1 ? strides[rank - 2] : 0;
  memcpy(map, told, 128);
  note("map %d rank %u dims %llu.. box %u.. swizzle %d", dtype, rank, (unsigned long long)dims[0], box[0], swizzle);
  return SUCCESS;
}

// For tests

const char *fake_log(void) { return log_text ? log_text : ""; }

int fake_live(const char *kind) {
  int found = 0;
  if (!strcmp(kind, "context")) return retained;
  for (Object *o = objects; o; o = o->next) found += !strcmp(kinds[o->kind], kind);
  return found;
}

int fake_pending(void) {  // what was started and not done
  int found = 0;
  for (Object *o = objects; o; o = o->next)
    for (Op *op = o->kind == STREAM ? o->first : NULL; op; op = op->next) found++;
  return found;
}

// The n-th call of the function from now on does nothing but fail.
void fake_fail(const char *name, int n, int code) {
  snprintf(fail_name, sizeof fail_name, "%s", name);
  fail_in = n;
  fail_code = code;
}

void fake_kernels(Hook *wanted) { hook = wanted; }
