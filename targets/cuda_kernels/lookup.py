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
    sizes = (num_heads, num_kv_heads, head_dim, page_size)
    q = Param("q", ("n", num_heads, head_dim), "float32", HALVES)
    params = (*rope_params(*sizes, kv_dtype), q)

    def code(dtypes: Sequence[str]) -> Code:
        launch, text = rope_launch(sizes, (dtypes[0], dtypes[4], dtypes[5]), tensor(5))
        return Code(("rope_append.cuh",), {launch.function: text}, (Variant(1, (launch,)),))

    return DeviceKernel("rope_append", params, code, "kernel: targets/cuda_kernels/lookup.py")


def rope_params(num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, kv_dtype: str) -> list[Param]:
    """What turning and appending takes: qkv, cos, sin, slots, pages."""
    qkv = Param("qkv", ("n", (num_heads + 2 * num_kv_heads) * head_dim), "float32", HALVES)
    angles = [Param(name, ("n", head_dim // 2), "float32") for name in ("cos", "sin")]
    page = "uint16" if kv_dtype == "bfloat16" else kv_dtype
    pages = Param("pages", ("num_pages", 2, num_kv_heads, page_size, head_dim), page)
    return [qkv, *angles, Param("slots", ("n",), "int32"), pages]


def rope_launch(sizes: Sequence[int], dtypes: Sequence[str], q: list[object]) -> tuple[Launch, str]:
    """(launch, definition) on rope_params as the call's first arguments, with the turned queries going to `q`.

    sizes: num_heads, num_kv_heads, head_dim, page_size. dtypes: of qkv, pages and q.
    """
    num_heads, num_kv_heads, head_dim, _ = sizes
    constants = [*(C_TYPES[dtype] for dtype in dtypes), *map(str, sizes)]
    name = "_".join(["rope_append", *constants])
    body = f"rope_append<{', '.join(constants)}>(qkv, cos, sin, slots, pages, q);"
    pointers = [f"const {constants[0]}* qkv", "const float* cos", "const float* sin", "const i32* slots"]
    pointers += [f"{constants[1]}* pages", f"{constants[2]}* q"]
    pairs = (num_heads + 2 * num_kv_heads) * head_dim // 2  # of a token
    launch = Launch(name, ("n", -(-pairs // THREADS), 1), THREADS, (*map(tensor, range(5)), q))
    return launch, definition(name, pointers, body, THREADS)
