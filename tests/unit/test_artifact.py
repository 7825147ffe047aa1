"""Artifacts on disk: written whole or not at all, read with suspicion, and the target that this machine runs best."""

import contextlib
import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlcgen import artifact
from mlcgen.adapter_layout import AdapterLayout
from mlcgen.artifact import WeightWriter, map_weights, new_artifact, read_manifest
from mlcgen.errors import ArtifactError, TargetError
from mlcgen.runtime import load, target_choice
from mlcgen.runtime.target_choice import choose_target

MANIFEST: dict[str, Any] = {
    "schema_version": artifact.SCHEMA_VERSION,
    "name": "tiny",
    "model": {"vocab_size": 96, "eos_token_ids": [2], "rope": {"inv_freq": [1.0] * 8}},
    "quantization": "f32",
    "kv": {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "page_size": 16, "dtype": "float32"},
    "entry": {"name": "forward", "inputs": ["input_ids", "positions"], "weights": ["a"]},
    "context_length": 128,
    "max_batch": 4,
    "targets": [
        {
            "name": "cpu",
            "kind": "cpu",
            "arch": "x86_64",
            "features": ["avx2"],
            "executor": "vm",
            "max_tokens_per_step": 512,
            "file": "lib/cpu.so",
            "sha256": "0",
        }
    ],
    "runtime_libraries": [{"arch": "x86_64", "file": "lib/x86_64/libtvm_runtime.so", "sha256": "0"}],
    "weights": [{"file": artifact.WEIGHTS, "sha256": "0", "is_hashed_by_blocks": True, "bytes": 64}],
    "random_weights": False,
    "versions": {"mlcgen": "0.1.0"},
}


def write_manifest(path: Path, manifest: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    artifact.write_json(path / artifact.MANIFEST, manifest)
    return path


def changed(where: str, value: Any) -> dict[str, Any]:
    """The manifest with the field at a.b.0.c set, or removed for `...`."""
    manifest = copy.deepcopy(MANIFEST)
    *parents, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    fields: Any = manifest
    for key in parents:
        fields = fields[key]
    if value is ...:
        del fields[last]
    else:
        fields[last] = value
    return manifest


# new_artifact


def test_takes_its_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "dist" / "tiny"
    with new_artifact(path) as staging:
        write_manifest(staging, MANIFEST)
        assert not path.exists()
        assert staging.parent == path.parent  # so that the rename cannot cross file systems
    assert read_manifest(path) == MANIFEST
    assert os.listdir(path.parent) == ["tiny"]
    assert path.stat().st_mode & 0o777 == 0o755


def test_replaces_an_artifact(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "tiny", {**MANIFEST, "schema_version": 0})
    (path / "left over").write_text("")
    with new_artifact(path) as staging:
        write_manifest(staging, MANIFEST)
    assert os.listdir(tmp_path) == ["tiny"]
    assert os.listdir(path) == [artifact.MANIFEST]
    assert read_manifest(path) == MANIFEST


def test_fills_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with new_artifact(tmp_path / "tiny") as staging:
        write_manifest(staging, MANIFEST)
    assert read_manifest(tmp_path / "tiny") == MANIFEST


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("is_there", [False, True])
def test_leaves_nothing_after_an_error(tmp_path: Path, error: type[BaseException], is_there: bool) -> None:
    path = tmp_path / "tiny"
    if is_there:
        write_manifest(path, MANIFEST)
    with pytest.raises(error), new_artifact(path) as staging:  # noqa: PT012
        (staging / "lib").mkdir()
        raise error
    assert os.listdir(tmp_path) == (["tiny"] if is_there else [])
    assert not is_there or read_manifest(path) == MANIFEST


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_the_old_artifact_survives_a_failing_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = write_manifest(tmp_path / "tiny", MANIFEST)
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if target == path and self.name != "artifact":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(type(error)), new_artifact(path) as staging:
        write_manifest(staging, {**MANIFEST, "name": "new"})
    assert os.listdir(tmp_path) == ["tiny"]
    assert read_manifest(path) == MANIFEST


@pytest.mark.parametrize("what", ["directory", "web app", "damaged manifest", "file", "dangling link"])
def test_never_replaces_anything_else(tmp_path: Path, what: str) -> None:
    path = tmp_path / "precious"
    if what == "file":
        path.write_text("data")
    elif what == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("data")
        if what == "web app":
            write_manifest(path, {"manifest_version": 3, "name": "an extension of a browser"})
        elif what == "damaged manifest":
            (path / artifact.MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="exists and is no artifact; choose another output"), new_artifact(path):
        pytest.fail("must not begin")
    assert os.listdir(tmp_path) == ["precious"]
    assert what in ("file", "dangling link") or (path / "notes.txt").read_text() == "data"


# Weights

TENSORS = {
    "odd": np.arange(3, dtype=np.uint8),
    "matrix": np.random.default_rng(0).standard_normal((5, 7), np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "half": np.arange(33, dtype=np.float16).reshape(3, 11),
    "aligned": np.arange(64, dtype=np.uint16),
    "scalar": np.array(1.5, np.float32),
    "one": np.ones(1, np.uint8),
}


def write_weights(file: Path, order: list[str] | None = None) -> Path:
    writer = WeightWriter(file, {name: (array.shape, str(array.dtype)) for name, array in TENSORS.items()})
    for name in order or TENSORS:
        writer.write(name, TENSORS[name])
    writer.close()
    return file


@pytest.mark.parametrize("order", [list(TENSORS), list(reversed(TENSORS)), sorted(TENSORS)])
def test_weights_come_back_aligned(tmp_path: Path, order: list[str]) -> None:
    file = write_weights(tmp_path / "weights" / "model.safetensors", order)
    mapped = map_weights(file)
    assert list(mapped) == list(TENSORS)
    for name, array in mapped.items():
        assert array.dtype == TENSORS[name].dtype
        assert array.ctypes.data % 64 == 0
        np.testing.assert_array_equal(array, TENSORS[name])
    assert file.stat().st_size % 64 == 0
    assert file.read_bytes() == write_weights(tmp_path / "again").read_bytes()


def test_the_safetensors_library_reads_them(tmp_path: Path) -> None:
    theirs = safetensors.numpy.load_file(write_weights(tmp_path / "w"))
    for name, array in TENSORS.items():
        assert theirs[name].dtype == array.dtype
        np.testing.assert_array_equal(theirs[name], array)


def test_weights_that_are_not_contiguous(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    writer = WeightWriter(tmp_path / "w", {"a": (array.shape, "float32")})
    writer.write("a", array)
    writer.close()
    np.testing.assert_array_equal(map_weights(tmp_path / "w")["a"], array)


def test_a_full_disk_is_told_as_such() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left"):
        WeightWriter(full, {"a": ((1 << 20,), "float32")}).write("a", np.zeros(1 << 20, np.float32))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -64, -1])
def test_truncated_weights(tmp_path: Path, keep: int) -> None:
    file = write_weights(tmp_path / "w")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="is damaged"):
        map_weights(file)


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        map_weights(tmp_path / "none")
    with pytest.raises(ArtifactError, match="cannot read"):
        map_weights(tmp_path)


@pytest.mark.parametrize("array", [np.zeros(16, np.int64), np.zeros(16, np.bool_)])
def test_weights_of_a_type_that_is_never_written(tmp_path: Path, array: np.ndarray) -> None:
    safetensors.numpy.save_file({"a": array}, tmp_path / "w")
    with pytest.raises(ArtifactError, match="no kernel reads"):
        map_weights(tmp_path / "w")


def raw_file(file: Path, header: bytes, data: bytes = b"") -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


def test_unaligned_weights(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    with pytest.raises(ArtifactError, match="no kernel reads"):
        map_weights(raw_file(tmp_path / "w", header + b" " * (-(len(header) + 4) % 64), b"\0" * 8))


def test_a_shape_that_no_array_has(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, *[(1 << 63) - 1] * 4], "data_offsets": [0, 0]}}).encode()
    with pytest.raises(ArtifactError):
        map_weights(raw_file(tmp_path / "w", header + b" " * (-(len(header) + 8) % 64)))


@pytest.mark.parametrize("depth", [*range(900, 1010), 100_000])
def test_deeply_nested_headers(tmp_path: Path, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    header = f'{{"a": {{"dtype": "F32", "shape": {nested}, "data_offsets": [0, 0]}}}}'
    with pytest.raises(ArtifactError):
        map_weights(raw_file(tmp_path / "w", header.encode()))


# Manifest


def test_reads_what_was_written(tmp_path: Path) -> None:
    assert read_manifest(write_manifest(tmp_path, MANIFEST)) == MANIFEST
    assert read_manifest(str(tmp_path)) == MANIFEST


@pytest.mark.parametrize("version", [0, 1, 3, "2", True, 2.0, None, ..., [1], "x" * 1000])
def test_another_schema(tmp_path: Path, version: Any) -> None:
    with pytest.raises(ArtifactError, match=r"has schema_version .*, this mlcgen reads 2; compile") as error:
        read_manifest(write_manifest(tmp_path, changed("schema_version", version)))
    assert len(str(error.value)) < len(str(tmp_path)) + 200


def paths_of(value: Any, prefix: str = "") -> list[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in (f"{prefix}{key}", *paths_of(item, f"{prefix}{key}."))]


@pytest.mark.parametrize("where", [path for path in paths_of(MANIFEST) if "versions." not in path])
@pytest.mark.parametrize("value", [..., None, -1.5, {"a": 1}, [[]]], ids=repr)
def test_every_field_is_checked(tmp_path: Path, where: str, value: Any) -> None:
    manifest = changed(where, value)
    if where == "versions" and isinstance(value, dict):
        return
    if value is ... and where.split(".")[-1].isdigit() and where not in ("targets.0", "weights.0"):
        read_manifest(write_manifest(tmp_path, manifest))  # a shorter list is a list
        return
    if ".inv_freq." in where and isinstance(value, float):
        return
    with pytest.raises(ArtifactError, match="compile the model again"):
        read_manifest(write_manifest(tmp_path, manifest))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("kv.page_size", 0),
        ("kv.num_layers", -1),
        ("kv.head_dim", 1 << 40),
        ("kv.head_dim", True),
        ("kv.dtype", "float8"),
        ("context_length", 0),
        ("max_batch", 0),
        ("model.vocab_size", 0),
        ("entry.inputs", ["__class__"]),
    ],
)
def test_impossible_values(tmp_path: Path, where: str, value: Any) -> None:
    with pytest.raises(ArtifactError, match=where):
        read_manifest(write_manifest(tmp_path, changed(where, value)))


ADAPTED: dict[str, Any] = {
    "rank": 8,
    "slots": 4,
    "dtype": "float16",
    "groups": [{"projections": ["q", "k"], "in_features": 64, "out_features": [64, 32]}],
    "arguments": ["input_ids", "adapter_slots", "lora_a_0", "lora_b_0", "pages_1"],
}


def with_adapters(path: Path, where: str = "rank", value: Any = 8, file: Any = "lib/cpu.adapters.so") -> Path:
    manifest = {**copy.deepcopy(MANIFEST), "adapters": {**copy.deepcopy(ADAPTED), where: value}}
    manifest["targets"][0]["adapted"] = {"file": file, "sha256": "0"}
    return write_manifest(path, manifest)


def test_adapters(tmp_path: Path) -> None:
    manifest = read_manifest(with_adapters(tmp_path))
    assert AdapterLayout.from_json(manifest["adapters"]).to_json() == ADAPTED
    with pytest.raises(ArtifactError, match="not inside"):
        read_manifest(with_adapters(tmp_path, file="../x.so"))
    with pytest.raises(ArtifactError, match="adapted"):
        read_manifest(write_manifest(tmp_path, changed("adapters", ADAPTED)))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("rank", 0),
        ("rank", 1 << 20),
        ("slots", "4"),
        ("dtype", "int8"),
        ("groups", [{"projections": ["q"], "in_features": 64, "out_features": [64, 32]}]),
        ("groups", [{"projections": [], "in_features": 64, "out_features": []}]),
        ("groups", [{"projections": ["q"], "in_features": -1, "out_features": [64]}]),
        ("arguments", ["lora_a_1"]),
        ("arguments", ["pages_2"]),
        ("arguments", ["pages_-1"]),
        ("arguments", ["pages_" + "9" * 9999]),
        ("arguments", ["__class__"]),
        ("arguments", [0]),
    ],
)
def test_impossible_adapters(tmp_path: Path, where: str, value: Any) -> None:
    with pytest.raises(ArtifactError, match=f"adapters.{where}"):
        read_manifest(with_adapters(tmp_path, where, value))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "lib/../../x", "link/x", "loop", "", "a\0b", "\ud800", 7, None, "..", "x/" * 5000]
)
@pytest.mark.parametrize("kind", ["targets", "weights", "runtime_libraries"])
def test_files_outside(tmp_path: Path, kind: str, name: Any) -> None:
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "link").symlink_to(tmp_path)
    (path / "loop").symlink_to("loop")
    (path / artifact.MANIFEST).write_text(json.dumps(changed(f"{kind}.0.file", name)))
    if isinstance(name, str) and len(name) > 1000:  # inside, but there is no such file
        manifest = read_manifest(path)
        with pytest.raises(ArtifactError, match="cannot read"):
            artifact.check_hash(path, manifest[kind][0])
        return
    with pytest.raises(ArtifactError, match=r"not inside the artifact|compile the model again"):
        artifact.check_hash(path, read_manifest(path)[kind][0])


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    entry = {"file": "a", "sha256": artifact.sha256(tmp_path / "a")}
    assert entry["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifact.check_hash(tmp_path, entry) == tmp_path.resolve() / "a"
    (tmp_path / "a").write_bytes(b"abd")
    with pytest.raises(ArtifactError, match="is damaged"):
        artifact.check_hash(tmp_path, entry)
    (tmp_path / "a").unlink()
    with pytest.raises(ArtifactError, match=r"cannot read .*No such file"):
        artifact.check_hash(tmp_path, entry)
    (tmp_path / "a").mkdir()
    with pytest.raises(ArtifactError, match="cannot read"):
        artifact.check_hash(tmp_path, entry)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250])
def test_hashes_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(artifact, "HASH_BLOCK", 100)
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "a").write_bytes(data)
    blocks = [hashlib.sha256(data[start : start + 100]).digest() for start in range(0, size, 100)]
    entry = {"file": "a", "sha256": hashlib.sha256(b"".join(blocks)).hexdigest(), "is_hashed_by_blocks": True}
    assert artifact.check_hash(tmp_path, entry) == tmp_path.resolve() / "a"
    (tmp_path / "a").write_bytes(data[:-1] + b"?" if data else b"?")
    with pytest.raises(ArtifactError, match="is damaged"):
        artifact.check_hash(tmp_path, entry)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"null", b'{"a": ' * 100_000])
def test_no_manifest(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"is no artifact: it has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / artifact.MANIFEST).write_bytes(text)
    with pytest.raises(ArtifactError, match="compile the model again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("where", ["schema_version", "name", "kv.page_size"])
def test_deeply_nested_values(tmp_path: Path, where: str) -> None:
    for depth in range(900, 1010):
        text = json.dumps(changed(where, "HERE")).replace('"HERE"', "[" * depth + "]" * depth)
        (tmp_path / artifact.MANIFEST).write_text(text)
        with pytest.raises(ArtifactError):
            read_manifest(tmp_path)


# Fuzz: nothing but ArtifactError comes out

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.lists(st.tuples(st.sampled_from(paths_of(MANIFEST)), JSON | st.just(...)), min_size=1, max_size=3))
def test_fuzz_manifest_fields(tmp_path: Path, changes: list[tuple[str, Any]]) -> None:
    manifest = MANIFEST
    for where, value in changes:
        *parents, last = [int(key) if key.isdigit() else key for key in where.split(".")]
        manifest = copy.deepcopy(manifest)
        fields: Any = manifest
        try:
            for key in parents:
                fields = fields[key]
            if value is ...:
                del fields[last]
            else:
                fields[last] = value
        except (KeyError, IndexError, TypeError, ValueError):  # an earlier change took it away
            continue
    (tmp_path / artifact.MANIFEST).write_text(json.dumps(manifest))
    try:
        manifest = read_manifest(tmp_path)
    except ArtifactError:
        return
    assert load.page_bytes(manifest["kv"]) > 0
    assert load.default_num_pages(manifest, manifest["max_batch"]) >= 1
    for entry in [*manifest["targets"], *manifest["weights"]]:
        with pytest.raises(ArtifactError):
            artifact.check_hash(tmp_path, entry)


@fuzz
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()), st.integers(0, 2000), st.binary())
def test_fuzz_manifest_bytes(tmp_path: Path, insert: bytes, at: int, instead: bytes) -> None:
    text = json.dumps(MANIFEST).encode()
    (tmp_path / artifact.MANIFEST).write_bytes(text[:at] + insert + text[at + len(instead) :])
    with contextlib.suppress(ArtifactError):
        read_manifest(tmp_path)


DIMS = st.lists(st.integers(0, 9) | st.sampled_from([-1, 1 << 31, (1 << 63) - 1, 1 << 63]), max_size=18) | JSON
FIELDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*artifact.STORAGE, "I64", "BF16", "F4", "BOOL"]) | JSON,
        "shape": DIMS,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 64, 128, -4, 1 << 63]), min_size=2, max_size=2) | JSON,
    }
)


@fuzz
@given(st.dictionaries(st.text(max_size=5), FIELDS | JSON, max_size=3), st.sampled_from([0, 4, 64, 128]), st.booleans())
def test_fuzz_weights_header(tmp_path: Path, header: dict[str, Any], size: int, is_aligned: bool) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64 if is_aligned else 0)
    try:
        mapped = map_weights(raw_file(tmp_path / "w", text, b"\1" * size))
    except ArtifactError:
        return
    for array in mapped.values():
        assert array.sum() >= 0  # every byte can be read


@fuzz
@given(st.integers(0, 1000), st.binary(max_size=40))
def test_fuzz_weights_bytes(tmp_path: Path, at: int, instead: bytes) -> None:
    whole = write_weights(tmp_path / "good").read_bytes()
    (tmp_path / "w").write_bytes(whole[:at] + instead + whole[at + len(instead) :])
    with contextlib.suppress(ArtifactError):
        for array in map_weights(tmp_path / "w").values():
            array.tobytes()


# choose_target

FEATURES = {
    "cpu:x86-64-v2": ["popcnt", "sse4.2"],
    "cpu:x86-64-v3": ["popcnt", "sse4.2", "avx2", "fma"],
    "cpu:x86-64-v4": ["popcnt", "sse4.2", "avx2", "fma", "avx512f"],
}


def entry(name: str, arch: str = "x86_64", features: list[str] | None = None, executor: str = "vm") -> dict[str, Any]:
    return {"name": name, "arch": arch, "features": features or FEATURES.get(name, []), "executor": executor}


VARIANTS = [*map(entry, FEATURES), entry("cpu:aarch64", "aarch64", ["neon"])]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def be(arch: str, *features: str) -> None:
        monkeypatch.setattr("platform.machine", lambda: arch)
        monkeypatch.setattr(target_choice, "host_features", lambda: frozenset(features))

    return be


@pytest.mark.parametrize("arch", ["x86_64", "AMD64"])
@pytest.mark.parametrize("best", FEATURES)
@pytest.mark.parametrize("order", [1, -1])
def test_the_best_variant_wins(machine: Any, best: str, arch: str, order: int) -> None:
    machine(arch, *FEATURES[best], "something new")
    assert choose_target(VARIANTS[::order], "auto")["name"] == best


@pytest.mark.parametrize("arch", ["aarch64", "arm64"])
def test_another_architecture(machine: Any, arch: str) -> None:
    machine(arch, "neon")
    assert choose_target(VARIANTS, "auto")["name"] == "cpu:aarch64"
    with pytest.raises(TargetError, match="cpu:x86-64-v3: needs x86_64, this is aarch64"):
        choose_target(VARIANTS, "cpu:x86-64-v3")
    with pytest.raises(TargetError, match="no target that runs here"):
        choose_target(VARIANTS[:3], "auto")


def test_a_named_variant(machine: Any) -> None:
    machine("x86_64", *FEATURES["cpu:x86-64-v3"])
    assert choose_target(VARIANTS, "cpu:x86-64-v2")["name"] == "cpu:x86-64-v2"
    with pytest.raises(TargetError, match=r"\(cpu:x86-64-v4: this CPU has no avx512f\)"):
        choose_target(VARIANTS, "cpu:x86-64-v4")


def test_unknown_names_list_what_there_is(machine: Any) -> None:
    machine("x86_64")
    with pytest.raises(TargetError, match=r"'cuda' is not in this artifact; it has: cpu:x86-64-v2, cpu:x86-64-v3"):
        choose_target(VARIANTS, "cuda")


def test_nothing_runs_here(machine: Any) -> None:
    machine("x86_64", "popcnt")
    with pytest.raises(TargetError, match=r"cpu:x86-64-v2: this CPU has no sse4\.2; .*compile it for this machine"):
        choose_target(VARIANTS, "auto")


def test_an_executor_of_the_future(machine: Any) -> None:
    machine("x86_64", *FEATURES["cpu:x86-64-v2"])
    assert choose_target([*VARIANTS, entry("gpu", executor="plan")], "auto")["name"] == "cpu:x86-64-v2"
    with pytest.raises(TargetError, match="executor 'plan' is not in this version"):
        choose_target([entry("gpu", executor="plan")], "auto")
