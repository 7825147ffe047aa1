"""How large pages of the KV cache are, and how many of them are of use."""

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from mlcgen.runtime.vm_executor import KV_STORAGE


def page_bytes(kv: Mapping[str, Any]) -> int:
    """Bytes of one page over all layers."""
    shape = (kv["num_layers"], 2, kv["num_kv_heads"], kv["page_size"], kv["head_dim"])
    return prod(int(d) for d in shape) * np.dtype(KV_STORAGE[kv["dtype"]]).itemsize


def useful_pages(manifest: Mapping[str, Any], max_batch: int) -> int:
    """Pages that a full batch of the longest sequences fills."""
    return max_batch * -(-int(manifest["context_length"]) // int(manifest["kv"]["page_size"]))
