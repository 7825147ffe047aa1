"""A model's kernels as text in Metal's language: compiled where it runs, by the system."""

from collections.abc import Mapping

from mlcgen.targets.device_kernel import Code
from mlcgen.targets.wgsl_to_cpp import Module, modules, prelude

# Builtins as parameters of a kernel: type, attribute.
ATTRIBUTES = {
    "workgroup_id": ("uint3", "threadgroup_position_in_grid"),
    "local_invocation_index": ("uint", "thread_index_in_threadgroup"),
    "local_invocation_id": ("uint3", "thread_position_in_threadgroup"),
    "num_workgroups": ("uint3", "threadgroups_per_grid"),
}


def metal_source(codes: Mapping[str, Code]) -> str:
    """All kernels as one text."""
    return prelude("metal") + "\n".join(module.text + metal_kernel(module) for module in modules(codes))


def metal_kernel(module: Module) -> str:
    """The kernel of a translated module: buffers have the indices of their bindings, the numbers' struct the next."""
    struct = module.struct
    params = [
        f"device {'const ' if b.is_read_only else ''}{b.type}* {b.name} [[buffer({i})]]"
        for i, b in enumerate(module.buffers)
    ]
    members = [b.name for b in module.buffers]
    if module.numbers:
        name, type_ = module.numbers
        params.append(f"constant {struct}::{type_}& {name} [[buffer({len(members)})]]")
        members.append(name)
    params += [f"{ATTRIBUTES[name][0]} {name} [[{ATTRIBUTES[name][1]}]]" for name in module.entry]
    memory = "".join(f"  threadgroup {struct}::{name}_type {name};\n" for name in module.workgroup)
    call = f"  {struct}{{{', '.join(members + module.workgroup)}}}.{module.name}({', '.join(module.entry)});\n"
    head = f"[[max_total_threads_per_threadgroup({module.threads})]]\nkernel void {module.name}"
    return f"{head}({', '.join(params)}) {{\n{memory}{call}}}\n"
