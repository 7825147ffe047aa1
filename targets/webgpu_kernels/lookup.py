"""Token embedding, and rotary embedding with the append to the KV pages."""

from collections.abc import Sequence

from mlcgen.formats import WeightFormat
from mlcgen.targets.device_kernel import Code, DeviceKernel, Param, Variant, tensor

from .code import Buffer, kernel, matrix_buffers, matrix_values, split_rows

THREADS = 128
HOW = "kernel: targets/webgpu_kernels/lookup.py"


def embedding(fmt: WeightFormat, vocab: int, hidden: int) -> DeviceKernel:
    """PrimFunc(ids (n,) int32; parts of the table; out (n, hidden) f32)."""
    parts = [Param(*part) for part in fmt.parts(vocab, hidden)]
    params = (Param("ids", ("n",), "int32"), *parts, Param("out", ("n", hidden), "float32"))

    def code(dtypes: Sequence[str]) -> Code:
        parts = split_rows(fmt, vocab, hidden)
        values = matrix_values(fmt, hidden) | {"SPLIT": len(parts) > 1}
        grid = (-(-hidden // (values["UNIT"] * THREADS)), "n", 1)
        name = f"embedding_{fmt.name}_{hidden}" + ("_split" if len(parts) > 1 else "")
        launches = []
        for rows in parts if len(parts) > 1 else [None]:
            table = matrix_buffers(fmt, hidden, [p.name for p in params], rows)
            buffers = [Buffer("ids", "i32", tensor(0)), *table, Buffer("out", "vec4<f32>", tensor(len(params) - 1))]
            numbers = rows.numbers if rows else None
            launch, text = kernel(name, "embedding.wgsl", values, buffers, grid, THREADS, numbers)
            launches.append(launch)
        return Code((), {name: text}, (Variant(1, tuple(launches)),))

    return DeviceKernel(f"embedding_{fmt.name}", params, code, HOW)


def rope_append(num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, kv_dtype: str) -> DeviceKernel:
    """PrimFunc(qkv (n, (H + 2 KV) D); cos, sin (n, D / 2) f32; slots (n,) int32; pages; q (n, H, D))."""
    heads = num_heads + 2 * num_kv_heads
    qkv = Param("qkv", ("n", heads * head_dim), "float32")
    angles = [Param(name, ("n", head_dim // 2), "float32") for name in ("cos", "sin")]
    slots, pages = Param("slots", ("n",), "int32"), pages_param(num_kv_heads, page_size, head_dim, kv_dtype)
    params = (qkv, *angles, slots, pages, Param("q", ("n", num_heads, head_dim), "float32"))

    def code(dtypes: Sequence[str]) -> Code:
        page = "vec2<f32>" if kv_dtype == "float32" else "u32"
        types = ("vec2<f32>", "vec2<f32>", "vec2<f32>", "i32", page, "vec2<f32>")
        buffers = [Buffer(p.name, type_, tensor(i)) for i, (p, type_) in enumerate(zip(params, types, strict=True))]
        sizes = (num_heads, num_kv_heads, head_dim, page_size)
        values = {**dict(zip(("H", "KV", "D", "PAGE"), sizes, strict=True)), "KV_DTYPE": kv_dtype}
        name = "_".join(["rope_append", kv_dtype, *map(str, sizes)])
        grid = (-(-heads * head_dim // 4 // THREADS), "n", 1)
        launch, text = kernel(name, "rope_append.wgsl", values, buffers, grid, THREADS)
        return Code((), {name: text}, (Variant(1, (launch,)),))

    return DeviceKernel("rope_append", params, code, HOW)


def pages_param(num_kv_heads: int, page_size: int, head_dim: int, kv_dtype: str) -> Param:
    dtype = "uint16" if kv_dtype == "bfloat16" else kv_dtype
    return Param("pages", ("num_pages", 2, num_kv_heads, page_size, head_dim), dtype)
