// What kernels ask of the hardware: number types, tensor-core products, asynchronous copies, warp exchanges.
//
// Kernels use nothing else that is particular to a GPU, besides CUDA's own __global__, __shared__, __syncthreads(),
// threadIdx, blockIdx, gridDim; so tests run them on a CPU with another file of this name.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using f16 = __half;
using bf16 = __nv_bfloat16;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

constexpr int WARP = 32;

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(f16 x) { return __half2float(x); }
DEVICE float to_float(bf16 x) { return __bfloat162float(x); }

template <class T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> DEVICE bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// Two values rounded to T in one register, `low` in its low half: the order of fragments.
template <class T> DEVICE u32 pack(float low, float high);
template <> DEVICE u32 pack<f16>(float low, float high) {
  __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<u32*>(&v);
}
template <> DEVICE u32 pack<bf16>(float low, float high) {
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<u32*>(&v);
}

// The two values of a register as floats.
template <class T> DEVICE float2 unpack(u32 v);
template <> DEVICE float2 unpack<f16>(u32 v) { return __half22float2(*reinterpret_cast<__half2*>(&v)); }
template <> DEVICE float2 unpack<bf16>(u32 v) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&v)); }

// a * b + c on both halves of a register, rounded once.
template <class T> DEVICE u32 fma_pair(u32 a, u32 b, u32 c);
template <> DEVICE u32 fma_pair<f16>(u32 a, u32 b, u32 c) {
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(a) : "r"(a), "r"(b), "r"(c));
  return a;
}
template <> DEVICE u32 fma_pair<bf16>(u32 a, u32 b, u32 c) {
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a) : "r"(a), "r"(b), "r"(c));
  return a;
}

// d (16x8, f32) += a (16x16) b (16x8), one warp. With g = lane / 4 and t = lane % 4:
//   a[0] = row g, columns 2t, 2t+1;  a[1] = row g+8, same;  a[2] = row g, columns 2t+8, 2t+9;  a[3] = row g+8, those
//   b[0] = rows 2t, 2t+1 of column g;  b[1] = rows 2t+8, 2t+9
//   d[0], d[1] = row g, columns 2t, 2t+1;  d[2], d[3] = row g+8
template <class T> DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <> DEVICE void mma<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> DEVICE void mma<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit values from shared memory; lane l names row l % 8 (16 bytes) of matrix l / 8.
// Register i of lane l gets row l / 4, columns 2 (l % 4) and the next of matrix i (transposed: of its transpose).
DEVICE void ldmatrix(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void ldmatrix_transposed(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// 16 bytes from global to shared memory without passing through registers; zeros where not `valid`.
DEVICE void copy_async(void* to_shared, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
      :: "r"(shared_address(to_shared)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the `N` groups committed last have arrived, for this thread; others see them after a barrier.
template <int N> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// 16 bytes that are read once: past the first-level cache.
DEVICE uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

template <class V> DEVICE V shuffle_xor(V v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
template <class V> DEVICE V shuffle(V v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEVICE void sync_warp() { __syncwarp(); }

DEVICE float warp_sum(float v) {
  for (int m = WARP / 2; m; m /= 2) v += shuffle_xor(v, m);
  return v;
}
DEVICE float warp_max(float v) {
  for (int m = WARP / 2; m; m /= 2) v = fmaxf(v, shuffle_xor(v, m));
  return v;
}

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Programmatic dependent launch (sm_90): a kernel starts while the one before it ends. What that one wrote may be
// read only after wait_for_previous(); let_next_start() lets the following kernel's blocks be placed.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Bytes of the pair (a: 0-3, b: 4-7) that the hexadecimal digits of `selector` name, the lowest digit first.
DEVICE u32 pick_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// a - b on both halves of a register.
DEVICE u32 subtract_pair_f16(u32 a, u32 b) {
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
  return a;
}

// One of `arrivals` threads of different blocks arrives at `counter` (0 before the first, 0 again after the last).
// True for the last of them, which sees all that the others wrote before they arrived.
DEVICE bool arrives_last(u32* counter, u32 arrivals) {
  __threadfence();
  bool last = atomicInc(counter, arrivals - 1) == arrivals - 1;
  __threadfence();
  return last;
}

// Whether `v` is true for some lane.
DEVICE bool any_lane(bool v) { return __any_sync(0xffffffffu, v); }

// Bulk copies (sm_90): one thread asks for many bytes from global memory, which count at a barrier in shared memory as
// they arrive there. The barrier's phases have parity 0, 1, 0, ...; one ends when all that expect_bulk() said is there.
DEVICE void init_bulk_barrier(u64* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // visible to the copies
#endif
}
// Once in each phase: all bytes (less than 2^20) that will arrive in it, those already asked for too.
DEVICE void expect_bulk(u64* barrier, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
      ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}
// `bytes`, both addresses: multiples of 16. Read once: the second-level cache drops them first.
DEVICE void copy_bulk(void* to_shared, const void* from, u32 bytes, u64* barrier) {
#if __CUDA_ARCH__ >= 900
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;"
      ::"r"(shared_address(to_shared)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory");
#endif
}
// Until the phase of this parity has ended; its bytes are then visible to the calling thread.
DEVICE void wait_bulk(u64* barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
  u32 done = 0;
  while (!done) {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
  }
#endif
}
// True for one lane, of a warp whose lanes are all here.
DEVICE bool one_lane() {
  u32 is_one = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(is_one));
#endif
  return is_one;
}

// (a & mask) | c in one instruction: a compiler that sees two constants makes two of it.
DEVICE u32 and_or(u32 a, u32 mask, u32 c) {
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(a) : "r"(a), "r"(mask), "r"(c));
  return a;
}
