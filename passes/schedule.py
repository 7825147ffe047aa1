"""Every kernel that no target wrote gets a schedule, and says how in its attribute `mlcgen.how`.

`elementwise` and `rows`: on a CPU, blocks in parallel with vectors inside; on a device of many threads, one thread for
each element. A kernel that no rule takes stays serial and is reported as a fallback.
"""

from collections.abc import Callable

from tvm import IRModule, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import ScheduleError

from mlcgen.targets.base import Target

HOW = "mlcgen.how"
LANES = 16


_Rule = Callable[[tirx.PrimFunc], tirx.PrimFunc | None]


def schedule(mod: IRModule, target: Target) -> IRModule:
    rules = _device_rules(target.block_threads) if target.block_threads else _CPU_RULES
    functions = dict(mod.functions.items())
    for gv, func in functions.items():
        if isinstance(func, tirx.PrimFunc) and not (func.attrs and HOW in func.attrs):
            functions[gv] = _scheduled(func, rules)
    return IRModule(functions, attrs=mod.attrs)


def _scheduled(func: tirx.PrimFunc, rules: dict[str, _Rule]) -> tirx.PrimFunc:
    for how, rule in rules.items():
        try:
            new = rule(func)
        except ScheduleError:  # the rule does not fit this kernel
            continue
        if new is not None:
            return new.with_attr(HOW, how)
    return func.with_attr(HOW, "fallback: serial")


def _elementwise(func: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """One spatial block after inlining: all loops fused, chunks in parallel, vectors inside."""
    sch = Schedule(func)
    blocks = _blocks(sch)
    if not blocks or not all(_is_spatial(sch, block) for block in blocks):
        return None
    for block in blocks[:-1]:
        sch.compute_inline(block)
    outer = sch.get_loops(blocks[-1])
    if not outer:
        return None
    innermost = sch.get(outer[-1]).extent
    if len(outer) > 1 and isinstance(innermost, tirx.IntImm) and int(innermost) % LANES == 0:
        chunks, vector = sch.split(outer[-1], [None, LANES])
        sch.vectorize(vector)
        outer = [*outer[:-1], chunks]  # one token alone is still shared among the threads
    sch.parallel(outer[0] if len(outer) == 1 else sch.fuse(*outer))
    return sch.mod["main"]


def _rows(func: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """Any mix of blocks: each one's outer spatial loop in parallel."""
    sch = Schedule(func)
    blocks = _blocks(sch)
    for block in blocks:
        iters = sch.get(block).iter_vars
        if not sch.get_loops(block) or int(iters[0].iter_type) != tirx.IterVar.DataPar:
            return None
        sch.parallel(sch.get_loops(block)[0])
    return sch.mod["main"] if blocks else None


_CPU_RULES: dict[str, _Rule] = {"rule: elementwise": _elementwise, "rule: rows": _rows}


def _device_rules(threads: int) -> dict[str, _Rule]:
    """The spatial loops of each block, all as one, bound to blocks of `threads` threads; a reduction stays serial."""

    def elementwise(func: tirx.PrimFunc) -> tirx.PrimFunc | None:
        sch = Schedule(func)
        blocks = _blocks(sch)
        while len(blocks) > 1 and _is_spatial(sch, blocks[0]):
            sch.compute_inline(blocks.pop(0))
        if len(blocks) != 1:
            return None
        iters = sch.get(blocks[0]).iter_vars
        loops = sch.get_loops(blocks[0])
        if len(loops) != len(iters):
            return None
        spatial = [loop for loop, i in zip(loops, iters, strict=True) if int(i.iter_type) == tirx.IterVar.DataPar]
        if not spatial or spatial != loops[: len(spatial)]:
            return None
        outer, inner = sch.split(sch.fuse(*spatial), [None, threads])
        sch.bind(outer, "blockIdx.x")
        sch.bind(inner, "threadIdx.x")
        return sch.mod["main"]

    return {"rule: elementwise": elementwise}


def _blocks(sch: Schedule) -> list[object]:
    root = sch.get_sblock("root")
    return list(sch.get_child_blocks(root))


def _is_spatial(sch: Schedule, block: object) -> bool:
    return all(int(i.iter_type) == tirx.IterVar.DataPar for i in sch.get(block).iter_vars)


def describe(mod: IRModule) -> dict[str, str]:
    """Kernel name -> how it was made, for the compile report."""
    return {gv.name_hint: str(f.attrs[HOW]) for gv, f in mod.functions.items() if isinstance(f, tirx.PrimFunc)}
