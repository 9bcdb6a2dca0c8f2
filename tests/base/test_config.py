"""Rows C1, C2 and C4 of the fault matrix, and what a configuration may hold."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.base.config import Bytes, Range, build, diff, load, to_dict
from trivium.base.errors import ConfigError


class Policy(enum.Enum):
    SKIP = "skip"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class Zero:
    stage: Annotated[int, Range(0, 3)] = 0
    bucket_bytes: Annotated[int, Bytes(), Range(low=1)] = 1 << 20
    reduce: Literal["ordered", "native"] = "ordered"
    clip: Annotated[float, Range(above=0)] | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    dim: int
    from_: Path | None = None
    widths: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    policy: Policy = Policy.SKIP

    def __post_init__(self) -> None:
        if self.dim % 8:
            raise ConfigError(f"dim = {self.dim}: expected a multiple of 8, nearest {round(self.dim / 8) * 8}")


@dataclass(frozen=True, kw_only=True)
class Run:
    model: Model
    zero_optimization: Zero = field(default_factory=Zero)
    steps: int = 10
    names: dict[str, int] = field(default_factory=dict)


def write(folder: Path, text: str | bytes, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


GOOD = """
steps = 20
[model]
dim = 64
from = "folder with spaces/é"
widths = [1, 2]
policy = "stop"
[zero_optimization]
stage = 3
bucket_bytes = "8MiB"
clip = 1
"""


def test_a_good_file(tmp_path: Path) -> None:
    run = load(Run, write(tmp_path, GOOD))
    assert run.model == Model(dim=64, from_=Path("folder with spaces/é"), widths=(1, 2), policy=Policy.STOP)
    assert run.zero_optimization == Zero(stage=3, bucket_bytes=8 << 20, clip=1.0)
    assert build(Run, to_dict(run)) == run
    assert to_dict(run)["model"]["from"] == "folder with spaces/é"


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"model": {"dim": 8}}', "run.json")
    assert load(Run, path).model.dim == 8


def test_c1_unknown_key_toml(tmp_path: Path) -> None:
    path = write(tmp_path, "[model]\ndim = 8\n\n[zero_optimisation]\nstage = 1\n")
    with pytest.raises(ConfigError) as caught:
        load(Run, path)
    assert f"{path}:4: " in str(caught.value)
    assert "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?" in str(caught.value)
    assert caught.value.exit_code == 2


def test_c1_unknown_key_json(tmp_path: Path) -> None:
    path = write(tmp_path, '{"model": {"dim": 8,\n "names": [{"x": 1}],\n\n "polcy": "skip"}}', "run.json")
    with pytest.raises(ConfigError) as caught:
        load(Run, path)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith(f"{path}:2: unknown key 'model.names'")
    assert lines[1] == f"{path}:4: unknown key 'model.polcy'; did you mean 'policy'?"


def test_c1_a_key_in_the_wrong_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'stage'; it belongs in \[zero_optimization\]"):
        load(Run, write(tmp_path, "stage = 3\n[model]\ndim = 8"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = '5'", "steps = '5': expected an integer"),
        ("steps = true", "steps = True: expected an integer"),
        ("steps = 1.0", "steps = 1.0: expected an integer"),
        ("steps = 'auto'", "steps = 'auto': expected an integer"),
        ("model.widths = [1, 'x']", "model.widths[1] = 'x': expected an integer"),
        ("model.betas = [0.9]", "model.betas = [0.9]: expected a list of 2: a finite number, a finite number"),
        ("model.betas = [0.9, nan]", "model.betas[1] = nan: expected a finite number"),
        ("model.policy = 'halt'", "model.policy = 'halt': expected one of 'skip', 'stop'"),
        ("model.from = 3", "model.from = 3: expected a path, or nothing"),
        ("zero_optimization.stage = 4", "zero_optimization.stage = 4: expected an integer from 0 to 3"),
        ("zero_optimization.stage = -1", "zero_optimization.stage = -1: expected an integer from 0 to 3"),
        ("zero_optimization.clip = 0", "zero_optimization.clip = 0: expected a finite number > 0, or nothing"),
        (
            "zero_optimization.clip = 'auto'",
            "zero_optimization.clip = 'auto': expected a finite number > 0, or nothing",
        ),
        ("zero_optimization.reduce = 'orderd'", "expected one of 'ordered', 'native'; did you mean 'ordered'?"),
        ("zero_optimization.bucket_bytes = '8 apples'", 'expected a size in bytes such as "8GiB" >= 1'),
        ("zero_optimization.bucket_bytes = 0", "zero_optimization.bucket_bytes = 0: expected"),
        ("zero_optimization = 3", "zero_optimization = 3: expected a table (keys: stage, bucket_bytes, reduce, clip)"),
        ("names.a = 'x'", "names.a = 'x': expected an integer"),
    ],
)
def test_c2_wrong_values(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, f"model.dim = 8\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load(Run, path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_c2_null_in_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.json:1: steps = None: expected an integer"):
        load(Run, write(tmp_path, '{"model": {"dim": 8}, "steps": null}', "run.json"))


def test_c2_a_missing_key_and_a_broken_rule() -> None:
    with pytest.raises(ConfigError, match=r"the key 'model\.dim' is missing: expected an integer"):
        build(Run, {"model": {}})
    with pytest.raises(ConfigError, match=r"here: \[model\] dim = 9: expected a multiple of 8, nearest 8"):
        build(Run, {"model": {"dim": 9}}, source="here")


def test_c2_all_errors_at_once_and_no_flood() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Run, {"model": {"dim": 8}, "names": {f"n{i}": "x" for i in range(50)}})
    assert len(str(caught.value).split("\n")) == 11
    assert "... and 40 more" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        build(Run, {"model": {"dim": "y" * 10_000}})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.toml", "steps = \n", ":1:9: Invalid value"),
        ("run.toml", "a = 1\n[model\ndim = 8", ":2:7: "),
        ("run.toml", "steps = 1\nsteps = 2", ":2:10: Cannot overwrite a value"),
        ("run.toml", "a = [1,", ":1:8: "),
        ("run.toml", "a = " + "[" * 100_000, "nested too deeply"),
        ("run.toml", "", "is empty"),
        ("run.toml", " \n\n", "is empty"),
        ("run.toml", b"\x7fELF\xff\xfe", "is not UTF-8 text (byte 0xff at offset 4)"),
        ("run.toml", b"a = 1\0", "is not text"),
        ("run.json", '{"a": 1,}', ":1:"),
        ("run.json", '{"steps": 1,\n "steps": 2}', "the key 'steps' stands twice"),
        ("run.json", '{"steps": NaN}', "NaN is not a JSON number"),
        ("run.json", "[1]", "expected an object"),
        ("run.json", "[" * 100_000, "nested too deeply"),
        ("run.json", '{"steps": 1' + "0" * 5000 + "}", "run.json: "),
    ],
)
def test_c4_files_that_cannot_be_read(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    path = write(tmp_path, text, name)
    with pytest.raises(ConfigError) as caught:
        load(Run, path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_c4_directory_missing_huge_and_special(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "train.toml")
    with pytest.raises(ConfigError, match=r"is a directory.*did you mean .*train\.toml"):
        load(Run, tmp_path)
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*train\.toml\?"):
        load(Run, tmp_path / "trian.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Run, tmp_path / ("x" * 5000))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Run, "a\0b.toml")
    huge = tmp_path / "huge.toml"
    with huge.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(ConfigError, match=r"has 104,857,600 bytes; a configuration has at most 1,048,576"):
        load(Run, huge)
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match="not a regular file"):
        load(Run, tmp_path / "pipe.toml")


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    run = load(
        Run,
        path,
        ["zero_optimization.stage=1", "zero_optimization.reduce=native", "model.widths=[3, 4]", "names.a=1", "steps=7"],
    )
    assert run.zero_optimization.stage == 1
    assert run.zero_optimization.reduce == "native"
    assert run.model.widths == (3, 4)
    assert run.names == {"a": 1}
    assert run.steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "--set steps: expected KEY=VALUE"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("a..b=3", "--set a..b=3: expected KEY=VALUE"),
        ("steps.x=3", "--set steps.x=3: steps is 20, not a table"),
        ("zero_optimization.stage=4", "--set zero_optimization.stage=4: zero_optimization.stage = 4: expected"),
        ("zero_optimization.stge=4", "unknown key 'zero_optimization.stge'; did you mean 'stage'?"),
        ("steps=1\nsteps = 2", "expected an integer"),
    ],
)
def test_bad_overrides(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Run, write(tmp_path, GOOD), [text])
    assert message in str(caught.value)


def test_diff() -> None:
    old = Run(model=Model(dim=8))
    new = Run(model=Model(dim=16), zero_optimization=Zero(stage=3))
    assert diff(old, old) == {}
    assert diff(old, new) == {"model.dim": (8, 16), "zero_optimization.stage": (0, 3)}
    assert diff(to_dict(old), new) == diff(old, new)
    assert diff({"a": 1}, {"b": {"c": 2}}) == {"a": (1, None), "b.c": (None, 2)}


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["model", "steps", "zero_optimization", "names", "x"]), ANY))
def test_any_mapping_builds_or_says_why(mapping: dict[str, object]) -> None:
    try:
        run = build(Run, mapping)
    except ConfigError as error:
        assert str(error).startswith("config: ")
    else:
        assert build(Run, to_dict(run)) == run
