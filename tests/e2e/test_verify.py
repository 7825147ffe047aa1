"""The artifact against the reference build: same module, no quantization, paging or fusion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcgen import verify as verify_module
from mlcgen.artifact import read_manifest
from mlcgen.verify import reference_logits, verify


@pytest.fixture(scope="module")
def reference() -> Callable[..., Any]:
    """reference_logits, which builds the reference once: artifacts of one checkpoint have the same."""
    made: dict[bytes, Any] = {}

    def once(checkpoint: Any, token_ids: np.ndarray) -> Any:
        key = token_ids.tobytes()
        if key not in made:
            made[key] = reference_logits(checkpoint, token_ids)
        return made[key]

    return once


@pytest.mark.parametrize(("quantization", "page_size"), [("f32", 16), ("q8", 64)])
def test_verify_stores_its_result(
    compile_smollm2: Callable[..., Path],
    reference: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    quantization: str,
    page_size: int,
) -> None:
    monkeypatch.setattr(verify_module, "reference_logits", reference)
    path = compile_smollm2(quantization, page_size=page_size)
    result = verify(path)
    assert result["passed"]
    assert result["top1_agreement"] == 1.0
    assert read_manifest(path)["verify"] == result
    if quantization == "f32":
        assert result["max_abs_logprob_error"] < 1e-3
