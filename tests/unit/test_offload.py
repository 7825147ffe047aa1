"""Which layers stay in memory, by a budget."""

import pytest

from mlcgen.errors import DeviceError, RequestError
from mlcgen.runtime.offload import divide, layer_of, num_bytes

SIZES = {"embed": 100, "norm": 1} | {
    f"layers.{i}.{part}": size for i in range(8) for part, size in (("a", 4), ("b", 6))
}


def test_all_stays_without_a_budget_or_with_one_that_is_enough() -> None:
    for budget in (None, 181, 10**9):
        division = divide(SIZES, budget)
        assert (division.resident, division.streamed) == (tuple(SIZES), ())


def test_no_more_layers_are_streamed_than_needed() -> None:
    for budget, count in ((180, 3), (171, 3), (170, 4), (160, 5), (121, 8)):
        division = divide(SIZES, budget)
        assert len(division.streamed) == count, budget
        assert division.slot_bytes == 10
        assert sum(SIZES[name] for name in division.resident) + 20 <= budget
        moving = [name for names in division.streamed for name in names]
        assert sorted([*division.resident, *moving]) == sorted(SIZES)


def test_streamed_layers_are_spread() -> None:
    found = divide(SIZES, 160).streamed
    assert [layer_of(names[0]) for names in found] == [1, 3, 4, 6, 7]
    assert found[0] == ("layers.1.a", "layers.1.b")


def test_the_largest_layer_decides_about_the_buffers() -> None:
    sizes = {f"layers.{i}.w": size for i, size in enumerate((50, 10, 10, 10, 10, 10))}
    division = divide(sizes, 81)
    assert division.slot_bytes == 10
    assert "layers.0.w" in division.resident


@pytest.mark.parametrize("budget", [120, 1, 0, -5])
def test_the_least_that_works_is_told(budget: int) -> None:
    with pytest.raises(DeviceError, match=r"weight_memory -?0\.00 MiB is too small: .* give at least 121 bytes"):
        divide(SIZES, budget)
    divide(SIZES, 121)


def test_a_model_without_layers() -> None:
    with pytest.raises(DeviceError, match="give at least 10 bytes"):
        divide({"w": 10}, 9)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up.weight", 12),
        ("a.3.experts.7.w", 3),
        ("lm_head.weight", None),
        ("x.²", None),
        ("model.999999999999.w", None),
    ],
)
def test_layers_by_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("512 mb", 512 * 10**6),
        ("1.5g", 1500 * 10**6),
        ("1000", 1000),
        ("7B", 7),
        ("2ki", 2048),
        (12, 12),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert num_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "1e9", "4 PiB", "4iB", "9" * 40, "٣GiB", "nan", 0, -1])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(RequestError, match="is no size"):
        num_bytes(text)
