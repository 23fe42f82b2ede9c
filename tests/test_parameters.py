"""A run's configuration from a notebook's namespace: every name a field, every value of its type."""
import dataclasses
from dataclasses import dataclass
from typing import Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchmix_repro.core import InputError, project_root, stable_hash
from patchmix_repro.parameters import checked, fits, plain_variables, run_folder_for, settle


@dataclass(frozen=True)
class Run:
    images: str = "shapes9"
    area: float = 0.2
    grids: tuple[int, ...] = (7,)
    rule: Literal["keep", "published"] = "keep"
    limit: int | None = 200
    mixed: bool = False
    out: str | None = None


@dataclass(frozen=True)
class Needy:
    model: str
    data: str = "shapes9"


@pytest.mark.parametrize("value, hint, right", [
    (1, int, True), (True, int, False), (1.0, int, False), ("1", int, False), (True, bool, True), (1, bool, False),
    (1, float, True), (True, float, False), (float("nan"), float, False), (float("inf"), float, False),
    (None, int | None, True), (None, Optional[int], True), (None, int, False), ("", str | None, True),  # noqa: UP045
    ((), tuple[int, ...], True), ((1, 2, 3), tuple[int, ...], True), ((1, "2"), tuple[int, ...], False), ([1], tuple[int, ...], False),
    ((1, 2), tuple[int, int], True), ((1,), tuple[int, int], False), (3, int | tuple[int, ...], True),
    ("keep", Literal["keep", "published"], True), ("kept", Literal["keep"], False), (True, Literal[1], False), (None, Literal["a"] | None, True),
])
def test_fits(value, hint, right):
    assert fits(value, hint) is right


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=3), st.none()))
def test_a_union_fits_when_a_part_does(value):
    assert fits(value, int | str | None) == any(fits(value, hint) for hint in (int, str, type(None)))
    assert fits(value, float) == (not isinstance(value, (bool, str)) and value is not None and abs(float(value)) < float("inf"))


def test_a_namespace_of_a_kernel():
    namespace = {"area": 1, "grids": [7, 14], "limit": None, "In": [""], "Out": {}, "exit": "x", "_": 3, "__name__": "__main__", "pytest": pytest, "run": Run()}
    assert checked(Run, namespace) == Run(area=1.0, grids=(7, 14), limit=None)
    assert checked(Run, {}) == Run()


@pytest.mark.parametrize("wrong, words", [
    ({"aera": 0.3}, "unknown parameter 'aera'; did you mean 'area'"), ({"occluder": {"a": 1}}, "unknown parameter 'occluder'"), ({"mixedd": True}, "did you mean 'mixed'"),
    ({"area": "0.2"}, "area is '0.2', a str; allowed is float"), ({"limit": 2.5}, "limit is 2.5, a float; allowed is int | None"),
    ({"mixed": 1}, "allowed is bool"), ({"rule": "publish"}, "did you mean 'published'"), ({"rule": 3}, "Literal['keep', 'published']"),
    ({"grids": ["7"]}, "allowed is tuple[int, ...]"), ({"images": None}, "allowed is str"), ({"images": print}, "a builtin_function_or_method"),
])
def test_wrong_names_and_types_name_the_remedy(wrong, words):
    with pytest.raises(InputError) as error:
        checked(Run, wrong)
    assert words in str(error.value)


def test_a_field_without_a_default_has_to_be_given():
    with pytest.raises(InputError, match="parameter model is missing"):
        checked(Needy, {})
    assert checked(Needy, {"model": "swin"}) == Needy("swin")


def test_settling_twice_changes_nothing():
    for value, hint in ((1, float), ([1], tuple[int, ...]), (1, int | float), (None, float | None)):
        once = settle("x", value, hint)
        assert settle("x", once, hint) == once and type(settle("x", once, hint)) is type(once)
    assert type(settle("x", 1, int | float)) is int and type(settle("x", 1, float)) is float


def test_only_plain_public_values_may_be_parameters():
    assert plain_variables({"a": 1, "_b": 1, "In": [], "quit": "", "c": object(), "d": None}) == {"a": 1, "d": None}


def test_the_folder_follows_the_configuration_alone(tmp_path):
    values = {k: v for k, v in dataclasses.asdict(Run()).items() if k != "out"}
    expected = project_root() / "runs" / f"occlude-{stable_hash(values, 8)}"
    assert run_folder_for("occlude", Run()) == run_folder_for("occlude", Run(out="x")) == expected
    assert run_folder_for("occlude", Run(area=0.3)) != expected != run_folder_for("explain", Run())
    assert run_folder_for("occlude", Run(limit=1), places=("out", "limit")) == run_folder_for("occlude", Run(limit=2), places=("out", "limit"))
    assert run_folder_for("occlude", Run(), str(tmp_path)) == tmp_path
