"""The artifact against the reference build: same module, no quantization, paging or fusion."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlcgen.artifact import read_manifest
from mlcgen.verify import verify


@pytest.mark.parametrize(("quantization", "options"), [("f32", {"page_size": 16}), ("q8", {})])
def test_verify_stores_its_result(
    compile_smollm2: Callable[..., Path], quantization: str, options: dict[str, int]
) -> None:
    path = compile_smollm2(quantization, **options)
    result = verify(path)
    assert result["passed"]
    assert result["top1_agreement"] == 1.0
    assert read_manifest(path)["verify"] == result
    if quantization == "f32":
        assert result["max_abs_logprob_error"] < 1e-3
