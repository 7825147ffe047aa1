// The parts of CUDA C++ that kernels use, besides barriers (fibers.h) and shared variables (memory.h).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__ inline  // what a kernel does not use costs nothing
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

constexpr int warpSize = 32;

// Vectors: float2, make_float2, and so on.

#define VECTORS(name, type)                                                                                  \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                   \
  struct name##3 { type x, y, z; };                                                                          \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; };                \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                           \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(char, signed char)
VECTORS(uchar, unsigned char)
VECTORS(short, short)
VECTORS(ushort, unsigned short)
VECTORS(int, int)
VECTORS(uint, unsigned)
VECTORS(longlong, long long)
VECTORS(ulonglong, unsigned long long)
VECTORS(float, float)
VECTORS(double, double)
#undef VECTORS

// Bits.

namespace emulator {
template <class To, class From> inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}
template <class T> struct Same { using type = T; };
template <class T> using same = typename Same<T>::type;  // a parameter that deduces nothing
}  // namespace emulator

inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcg(T* p, emulator::same<T> value) { *p = value; }
template <class T> void __stcs(T* p, emulator::same<T> value) { *p = value; }

// Arithmetic. The approximations of a GPU are less exact than these.

template <class A, class B> constexpr auto min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr auto max(A a, B b) { return a < b ? b : a; }

inline float emulated_rsqrtf(float x) { return static_cast<float>(1 / sqrt(static_cast<double>(x))); }
#define rsqrtf emulated_rsqrtf  // newer C libraries have one
#define __expf expf             // some declare this and its like
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
#define __powf powf
#define __sincosf sincosf
#define __fmaf_rn fmaf
#define __fsqrt_rn sqrtf
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

// Atomic operations: threads switch nowhere else than where they meet.

#define ATOMIC(name, expression)                               \
  template <class T> T atomic##name(T* address, emulator::same<T> value) { \
    T old = *address;                                          \
    *address = expression;                                     \
    return old;                                                \
  }
ATOMIC(Add, old + value)
ATOMIC(Sub, old - value)
ATOMIC(Min, value < old ? value : old)
ATOMIC(Max, value > old ? value : old)
ATOMIC(And, old & value)
ATOMIC(Or, old | value)
ATOMIC(Xor, old ^ value)
ATOMIC(Exch, value)
ATOMIC(Inc, old >= value ? 0 : old + 1)
ATOMIC(Dec, old == 0 || old > value ? value : old - 1)
#undef ATOMIC
template <class T> T atomicCAS(T* address, emulator::same<T> compare, emulator::same<T> value) {
  T old = *address;
  if (old == compare) *address = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// 16-bit numbers. Sums and products of two are exact enough in float that rounding twice rounds correctly.

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) : bits(emulator::bits<uint16_t>(static_cast<_Float16>(x))) {}
  operator float() const { return emulator::bits<_Float16>(bits); }
};

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    unsigned wide = __float_as_uint(x);
    bits = x != x ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;  // to the nearest, ties to even
  }
  operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};

#define ARITHMETIC(T, pair)                                                               \
  struct alignas(4) pair { T x, y; };                                                     \
  inline T operator+(T a, T b) { return static_cast<float>(a) + static_cast<float>(b); }  \
  inline T operator-(T a, T b) { return static_cast<float>(a) - static_cast<float>(b); }  \
  inline T operator*(T a, T b) { return static_cast<float>(a) * static_cast<float>(b); }  \
  inline T operator/(T a, T b) { return static_cast<float>(a) / static_cast<float>(b); }  \
  inline T operator-(T a) { return -static_cast<float>(a); }                              \
  inline T& operator+=(T& a, T b) { return a = a + b; }                                   \
  inline T& operator-=(T& a, T b) { return a = a - b; }                                   \
  inline T& operator*=(T& a, T b) { return a = a * b; }                                   \
  inline bool operator<(T a, T b) { return static_cast<float>(a) < static_cast<float>(b); } \
  inline bool operator>(T a, T b) { return static_cast<float>(a) > static_cast<float>(b); }
ARITHMETIC(__half, __half2)
ARITHMETIC(__nv_bfloat16, __nv_bfloat162)
#undef ARITHMETIC

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }

namespace emulator {

inline bool is_even(double x) { return bits<uint64_t>(x) % 2 == 0; }
inline bool is_even(float x) { return bits<uint32_t>(x) % 2 == 0; }

// a * b + c of 16-bit numbers with the last bit odd where inexact, so that rounding it again rounds correctly.
inline float fma_to_odd(float a, float b, float c) {
  double product = static_cast<double>(a) * b;  // exact
  double sum = product + c;
  double rest = sum - product;
  double error = (product - (sum - rest)) + (c - rest);  // exact too (Knuth's two-sum)
  if (isfinite(sum) && error != 0 && is_even(sum)) sum = nextafter(sum, error > 0 ? INFINITY : -INFINITY);
  float result = static_cast<float>(sum);
  if (isfinite(sum) && result != sum && is_even(result)) result = nextafterf(result, result < sum ? INFINITY : -INFINITY);
  return result;
}

}  // namespace emulator
