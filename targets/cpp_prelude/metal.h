// What translated kernels ask of Metal (C++14 with address spaces; Apple's Metal Shading Language Specification).
#include <metal_stdlib>

using namespace metal;

#define GLOBAL device
#define WORKGROUP threadgroup
#define UNIFORM(type) constant type&
#define CONSTANT constant constexpr const
#define INLINE inline

using f32 = float;
using u32 = uint;
using i32 = int;

template <class T> using vec2 = vec<T, 2>;
template <class T> using vec3 = vec<T, 3>;
template <class T> using vec4 = vec<T, 4>;

template <class T> INLINE vec2<T> make_vec2(T a) { return vec2<T>(a); }
template <class T> INLINE vec2<T> make_vec2(T a, T b) { return vec2<T>(a, b); }
template <class T> INLINE vec4<T> make_vec4(T a) { return vec4<T>(a); }
template <class T> INLINE vec4<T> make_vec4(vec<T, 4> a) { return a; }
template <class T> INLINE vec4<T> make_vec4(T a, T b, T c, T d) { return vec4<T>(a, b, c, d); }
template <class T> INLINE vec4<T> make_vec4(vec<T, 2> a, vec<T, 2> b) { return vec4<T>(a, b); }

INLINE void workgroupBarrier() { threadgroup_barrier(mem_flags::mem_threadgroup); }

template <class To, class From> INLINE To bitcast(From value) { return as_type<To>(value); }
template <class T> INLINE T inverseSqrt(T x) { return rsqrt(x); }
INLINE vec2<f32> unpack2x16float(u32 word) { return vec2<f32>(as_type<half2>(word)); }
INLINE u32 pack2x16float(vec2<f32> pair) { return as_type<u32>(half2(pair)); }

