// What translated kernels ask of AMD's GPUs, by clang's own words for them: no headers and no device library.

#define GLOBAL __attribute__((address_space(1)))
#define WORKGROUP  // references that the compiler traces back to their variables
#define UNIFORM(type) const type
#define CONSTANT constexpr
#define INLINE inline __attribute__((always_inline))
// With more than 192 registers to schedule for, RDNA's compiler asks for so much at once that it must spill.
#define KERNEL(threads)                                                                                               \
  extern "C" __attribute__((amdgpu_kernel, amdgpu_flat_work_group_size(threads, threads), amdgpu_num_vgpr(192),       \
                            visibility("protected"))) void
#define WORKGROUP_MEMORY(type, name)                                                       \
  static __attribute__((address_space(3), loader_uninitialized)) type name##_memory;       \
  type& name = (type&)name##_memory

using f32 = float;
using u32 = unsigned;
using i32 = int;

template <class T> using vec2 = T __attribute__((ext_vector_type(2)));
template <class T> using vec3 = T __attribute__((ext_vector_type(3)));
template <class T> using vec4 = T __attribute__((ext_vector_type(4)));

template <class T> INLINE vec2<T> make_vec2(T a) { return vec2<T>{a, a}; }
template <class T> INLINE vec2<T> make_vec2(T a, T b) { return vec2<T>{a, b}; }
template <class T> INLINE vec4<T> make_vec4(T a) { return vec4<T>{a, a, a, a}; }
template <class T> INLINE vec4<T> make_vec4(vec4<T> a) { return a; }
template <class T> INLINE vec4<T> make_vec4(T a, T b, T c, T d) { return vec4<T>{a, b, c, d}; }
template <class T> INLINE vec4<T> make_vec4(vec2<T> a, vec2<T> b) { return vec4<T>{a.x, a.y, b.x, b.y}; }

INLINE vec3<u32> workgroup_id() {
  return vec3<u32>{__builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y(),
                   __builtin_amdgcn_workgroup_id_z()};
}
INLINE u32 local_invocation_index() { return __builtin_amdgcn_workitem_id_x(); }  // workgroups have one dimension
INLINE vec3<u32> local_invocation_id() { return vec3<u32>{__builtin_amdgcn_workitem_id_x(), 0u, 0u}; }
INLINE vec3<u32> num_workgroups(u32 threads) {
  return vec3<u32>{__builtin_amdgcn_grid_size_x() / threads, __builtin_amdgcn_grid_size_y(),
                   __builtin_amdgcn_grid_size_z()};
}

// Of workgroup memory only, as in WGSL: what was read of other memory may stay in caches.
INLINE void workgroupBarrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup", "local");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup", "local");
}

template <class To, class From> INLINE To bitcast(From value) { return __builtin_bit_cast(To, value); }
template <class T> INLINE T select(T otherwise, T then, bool condition) { return condition ? then : otherwise; }
template <class T> INLINE T min(T a, T b) { return b < a ? b : a; }
template <class T> INLINE T max(T a, T b) { return a < b ? b : a; }
template <class T> INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> INLINE T abs(T x) { return x < T(0) ? -x : x; }
INLINE f32 dot(vec4<f32> a, vec4<f32> b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
INLINE f32 fma(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
INLINE f32 floor(f32 x) { return __builtin_floorf(x); }
INLINE f32 ceil(f32 x) { return __builtin_ceilf(x); }
INLINE f32 sqrt(f32 x) { return __builtin_sqrtf(x); }
INLINE f32 exp(f32 x) { return __builtin_amdgcn_exp2f(x * 1.44269504f); }
INLINE f32 inverseSqrt(f32 x) { return __builtin_amdgcn_rsqf(x); }
INLINE vec4<f32> inverseSqrt(vec4<f32> x) {
  return vec4<f32>{inverseSqrt(x.x), inverseSqrt(x.y), inverseSqrt(x.z), inverseSqrt(x.w)};
}

INLINE vec2<f32> unpack2x16float(u32 word) {
  return __builtin_convertvector(bitcast<vec2<_Float16>>(word), vec2<f32>);
}
INLINE u32 pack2x16float(vec2<f32> pair) { return bitcast<u32>(__builtin_convertvector(pair, vec2<_Float16>)); }

// sin(x + turns * pi / 2). The hardware's sine loses the digits of large angles, which positions make. x is turned by
// quarters to -pi / 4 .. pi / 4, exactly as far as float32 goes, where polynomials of x * x do (fitted at Chebyshev's
// nodes).
INLINE f32 sine(f32 x, i32 turns) {
  f32 quarters = __builtin_rintf(x * 0.636619772f);
  f32 r = fma(quarters, 4.37113901e-8f, fma(quarters, -1.57079637f, x));
  f32 z = r * r;
  f32 s = r + r * z * (-0.166666647f + z * (0.00833274747f + z * -0.000195876982f));
  f32 c = 1.0f - 0.5f * z + z * z * (0.0416666647f + z * (-0.00138883022f + z * 2.45477391e-05f));
  i32 quarter = i32(quarters) + turns;
  f32 found = quarter & 1 ? c : s;
  return quarter & 2 ? -found : found;
}
INLINE f32 sin(f32 x) { return sine(x, 0); }
INLINE f32 cos(f32 x) { return sine(x, 1); }

