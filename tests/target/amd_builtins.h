// clang's words for AMD's GPUs, for the emulator of CUDA's threads: what cpp_prelude/hip.h uses of them.
#define address_space(number)
#define loader_uninitialized section("shared_memory"), used
#define amdgpu_kernel
#define amdgpu_flat_work_group_size(least, most)
#define amdgpu_num_vgpr(count)
#define __builtin_amdgcn_workgroup_id_x() blockIdx.x
#define __builtin_amdgcn_workgroup_id_y() blockIdx.y
#define __builtin_amdgcn_workgroup_id_z() blockIdx.z
#define __builtin_amdgcn_workitem_id_x() threadIdx.x
#define __builtin_amdgcn_grid_size_x() (gridDim.x * blockDim.x)
#define __builtin_amdgcn_grid_size_y() gridDim.y
#define __builtin_amdgcn_grid_size_z() gridDim.z
#define __builtin_amdgcn_fence(order, scope, memory)
#define __builtin_amdgcn_s_barrier() __syncthreads()
#define __builtin_amdgcn_exp2f exp2f
#define __builtin_amdgcn_rsqf rsqrtf
