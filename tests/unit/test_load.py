"""Limits that were fixed when the artifact was compiled."""

import pytest

from mlcgen.errors import ArtifactError, RequestError
from mlcgen.runtime.load import _batch, load_executor


def test_batch_is_what_was_compiled_or_less() -> None:
    assert _batch({"max_batch": 8}, None) == 8
    assert _batch({"max_batch": 8}, 3) == 3


@pytest.mark.parametrize("wanted", [0, -1, 9])
def test_batch_beyond_the_plan_is_refused(wanted: int) -> None:
    with pytest.raises(ArtifactError, match=f"max_batch {wanted} "):
        _batch({"max_batch": 8}, wanted)


@pytest.mark.parametrize("size", ["much", 0, -1, "4 PiB"])
def test_what_is_no_size_is_told_before_anything_is_read(size: int | str) -> None:
    with pytest.raises(RequestError, match=rf"weight_memory '{size}' is no size"):
        load_executor("nowhere", weight_memory=size)
