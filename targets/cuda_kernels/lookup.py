"""Token embedding, and rotary embedding with the append to the KV pages."""

from collections.abc import Sequence

from mlcgen.formats import WeightFormat
from mlcgen.targets.device_kernel import Code, DeviceKernel, Launch, Param, Variant, null, tensor

from .code import C_TYPES, HALVES, definition, stored_type

THREADS = 256


def embedding(fmt: WeightFormat, vocab: int, hidden: int) -> DeviceKernel:
    """PrimFunc(ids (n,) int32; parts of the table; out (n, hidden) f32)."""
    parts = [Param(*part) for part in fmt.parts(vocab, hidden)]
    params = (Param("ids", ("n",), "int32"), *parts, Param("out", ("n", hidden), "float32"))
    names = [p.name for p in params]

    def code(dtypes: Sequence[str]) -> Code:
        name = f"embedding_{fmt.name}_{hidden}"
        body = f"embedding<{stored_type(fmt, hidden)}, {hidden}>(ids, w, scale, minimum, out);"
        pointers = ["const i32* ids", "const void* w", "const void* scale", "const void* minimum", "float* out"]
        order = ("ids", "w", "scale", "minimum", "out")
        args = tuple(tensor(names.index(p)) if p in names else null() for p in order)
        launch = Launch(name, ("n", 1, 1), THREADS, args)
        return Code(("stored.cuh",), {name: definition(name, pointers, body, THREADS)}, (Variant(1, (launch,)),))

    return DeviceKernel(f"embedding_{fmt.name}", params, code, "kernel: targets/cuda_kernels/lookup.py")


def rope_append(num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, kv_dtype: str) -> DeviceKernel:
    """PrimFunc(qkv (n, (H + 2 KV) D); cos, sin (n, D / 2) f32; slots (n,) int32; pages; q (n, H, D))."""
    width = (num_heads + 2 * num_kv_heads) * head_dim
    page = "uint16" if kv_dtype == "bfloat16" else kv_dtype
    pages = Param("pages", ("num_pages", 2, num_kv_heads, page_size, head_dim), page)
    angles = [Param(name, ("n", head_dim // 2), "float32") for name in ("cos", "sin")]
    slots = Param("slots", ("n",), "int32")
    q = Param("q", ("n", num_heads, head_dim), "float32", HALVES)
    params = (Param("qkv", ("n", width), "float32", HALVES), *angles, slots, pages, q)

    def code(dtypes: Sequence[str]) -> Code:
        types = [C_TYPES[dtypes[0]], C_TYPES[page], C_TYPES[dtypes[5]]]
        sizes = (num_heads, num_kv_heads, head_dim, page_size)
        name = "_".join(["rope_append", *types, *map(str, sizes)])
        body = f"rope_append<{', '.join([*types, *map(str, sizes)])}>(qkv, cos, sin, slots, pages, q);"
        pointers = [f"const {types[0]}* qkv", "const float* cos", "const float* sin", "const i32* slots"]
        pointers += [f"{types[1]}* pages", f"{types[2]}* q"]
        grid = ("n", -(-(width // 2) // THREADS), 1)
        launch = Launch(name, grid, THREADS, tuple(tensor(i) for i in range(6)))
        return Code(("rope_append.cuh",), {name: definition(name, pointers, body, THREADS)}, (Variant(1, (launch,)),))

    return DeviceKernel("rope_append", params, code, "kernel: targets/cuda_kernels/lookup.py")
