"""A module's kernels as machine code for a CPU, by TVM and LLVM."""

import tvm
from tvm import IRModule

# Takes as long as LLVM where a kernel has many buffers, and finds nothing: kernels ask for no more than they use.
_UNNEEDED = ["s_tir.CompactBufferAllocation"]


def build(mod: IRModule, target: tvm.target.Target) -> tvm.runtime.Executable:
    """The executable of a lowered module, or of kernels alone."""
    with tvm.transform.PassContext(disabled_pass=_UNNEEDED):
        return tvm.compile(mod, target=target, relax_pipeline=None, tir_pipeline="default")
