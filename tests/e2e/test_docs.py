"""The programs in docs/howto, run as they stand but for the artifact's place."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
PROGRAMS = {
    f"{name} {heading}": program
    for name in ("offload", "serve", "structured")
    for heading, program in re.findall(
        r"^#+ ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```", (HOWTO / f"{name}.md").read_text(), re.M | re.S
    )
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, compile_smollm2: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = compile_smollm2("f32", page_size=16)
    (artifact.parent / "dist").mkdir(exist_ok=True)
    for place, its_artifact in {"smollm2": artifact, "smollm2-q4": compile_smollm2("q4")}.items():
        link = artifact.parent / "dist" / place
        if not link.exists():
            link.symlink_to(its_artifact)
    monkeypatch.chdir(artifact.parent)
    exec(compile(PROGRAMS[name], name, "exec"), {})


def test_the_programs_were_found() -> None:
    assert len(PROGRAMS) == 10
