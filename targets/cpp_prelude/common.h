template <class T, u32 N> struct Array {
  T items[N];
  INLINE T operator[](u32 i) const { return items[i]; }
};

template <class T> INLINE T workgroupUniformLoad(WORKGROUP T& variable) {
  workgroupBarrier();
  T value = variable;
  workgroupBarrier();
  return value;
}

