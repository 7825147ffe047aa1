"""The order of the passes, on one page. A pass is a function IRModule -> IRModule in the file of its name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import tvm
from tvm import IRModule, relax

from mlcgen.adapter_layout import AdapterLimits
from mlcgen.passes.add_adapters import add_adapters
from mlcgen.passes.fuse_attention import fuse_attention
from mlcgen.passes.fuse_gate_up import fuse_gate_up
from mlcgen.passes.fuse_linear import fuse_linear
from mlcgen.passes.fuse_qkv import fuse_qkv
from mlcgen.passes.fuse_rope import fuse_rope
from mlcgen.passes.narrow_activations import narrow_activations
from mlcgen.passes.paged_attention import KvLayout, paged_attention
from mlcgen.passes.plain_attention import plain_attention
from mlcgen.passes.quantize import WeightSource, quantize
from mlcgen.passes.schedule import schedule
from mlcgen.passes.select_logit_rows import select_logit_rows
from mlcgen.passes.share_tensors import share_tensors
from mlcgen.targets.base import Target

Pass = Callable[[IRModule], IRModule]
NamedPass = tuple[str, Pass]


@dataclass(frozen=True)
class PassOptions:
    sources: Mapping[str, WeightSource]  # variable name of each parameter -> how it is stored
    kv: KvLayout
    bounds: Mapping[str, int]  # largest value of each symbolic dimension, for memory planning
    adapters: AdapterLimits | None = None  # of the function with their path


def model_pipeline(target: Target, options: PassOptions) -> list[NamedPass]:
    """From the plain model to kernels; what depends on weights alone is still in the function."""
    formats = {source.fmt.name: source.fmt for source in options.sources.values()}
    operand = "bfloat16" if set(formats) == {"bf16"} else "float16"

    def can_stack(names: Sequence[str]) -> bool:
        """Matrices of one storage format may share a buffer."""
        found = [options.sources[name] for name in names]
        return len({(source.fmt, source.in_groups) for source in found}) == 1

    passes: list[NamedPass] = [
        ("select_logit_rows", select_logit_rows),
        # Before quantize: stacking whole matrices is simpler than stacking their parts.
        ("fuse_qkv", partial(fuse_qkv, can_stack=can_stack)),
        ("fuse_gate_up", partial(fuse_gate_up, can_stack=can_stack)),
    ]
    if options.adapters is not None:
        # After projections became one: they share a path. Before fuse_linear: it takes bias and residual along.
        passes.append(("add_adapters", partial(add_adapters, limits=options.adapters, target=target)))
    return [
        *passes,
        ("quantize", partial(quantize, sources=options.sources)),
        ("fuse_linear", partial(fuse_linear, formats=formats, target=target)),
        ("paged_attention", partial(paged_attention, layout=options.kv, target=target)),
        # After paged_attention: rope moves into the kernel that appends to the pages.
        ("fuse_rope", partial(fuse_rope, layout=options.kv, target=target)),
        ("fuse_attention", partial(fuse_attention, target=target)),
        # Last: which kernels read a value is known only now.
        ("narrow_activations", partial(narrow_activations, target=target, preferred=operand)),
    ]


def reference_pipeline() -> list[NamedPass]:
    """The un-optimised build that `verify` and the tests compare against."""
    return [("plain_attention", plain_attention)]


def lowering_pipeline(target: Target, bounds: Mapping[str, int] | None = None) -> list[NamedPass]:
    """From Relax operators to scheduled kernels, planned memory and, for the virtual machine, its instructions."""
    transform = relax.transform

    def bound_dimensions(mod: IRModule) -> IRModule:
        for gv, func in list(mod.functions.items()):
            if bounds and isinstance(func, relax.Function):
                mod[gv] = func.with_attr("tir_var_upper_bound", dict(bounds))
        return mod

    passes = [
        # reshape stays an operator: the VM makes it an alias, a kernel would copy.
        ("legalize", transform.LegalizeOps(skip_ops=["relax.reshape"])),
        ("annotate_op_pattern", transform.AnnotateTIROpPattern()),
        ("fold_constant", transform.FoldConstant()),
        ("fuse_ops", transform.FuseOps()),
        ("fuse_tir", transform.FuseTIR()),
        # After fusion: a schedule is for the whole kernel.
        ("schedule", partial(schedule, target=target)),
        ("to_non_dataflow", transform.ToNonDataflow()),
        ("remove_purity_checking", transform.RemovePurityChecking()),
        ("call_tir_rewrite", transform.CallTIRRewrite()),
        ("bound_dimensions", bound_dimensions),
        ("plan_memory", transform.StaticPlanBlockMemory()),
        ("share_tensors", share_tensors),
    ]
    if target.executor == "plan":
        return passes
    return [
        *passes,
        ("lower_alloc_tensor", transform.LowerAllocTensor()),
        ("kill_after_last_use", transform.KillAfterLastUse()),
        ("lower_runtime_builtin", transform.LowerRuntimeBuiltin()),
        ("compute_prim_value", transform.ComputePrimValue()),
        ("vm_shape_lower", transform.VMShapeLower()),
        ("attach_global_symbol", transform.AttachGlobalSymbol()),
    ]


def run(mod: IRModule, passes: list[NamedPass], target: Target, observe: Callable[[str, IRModule], None]) -> IRModule:
    """Apply the passes in order; `observe(name, module)` is called after each, for timing and dumps."""
    with tvm.target.Target(target.tvm), tvm.transform.PassContext(opt_level=3):
        for name, apply in passes:
            mod = apply(mod)
            observe(name, mod)
    return mod
