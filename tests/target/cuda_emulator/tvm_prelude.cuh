// In place of targets/cuda_kernels/tvm_prelude.cuh: the C library has these names.
#pragma once
#include <stdint.h>

#include "primitives.cuh"
