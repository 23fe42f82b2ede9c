"""Errors that name the remedy, whole files or none, draws that depend on their name alone."""
import errno
import hashlib
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchmix_repro import core
from patchmix_repro.core import DataError, InputError, ReproError, StoreError, keep_memory

keys = st.lists(st.one_of(st.integers(0, 2**40), st.text(max_size=8)), max_size=3)


def test_every_error_is_ours_and_a_builtin():
    kinds = [v for v in vars(core).values() if isinstance(v, type) and issubclass(v, ReproError) and v is not ReproError]
    assert len(kinds) == 5 and all(any(issubclass(k, b) for b in (ValueError, OSError, ArithmeticError)) for k in kinds)


def test_choose_suggests_and_lists():
    with pytest.raises(InputError, match="did you mean 'swin'.*convnext, swin"):
        core.choose("model", "swim", ["convnext", "swin"])
    with pytest.raises(InputError, match="unknown model None"):
        core.choose("model", None, ["convnext", "swin"])
    with pytest.raises(InputError, match="unknown model 3"):
        core.choose("model", 3, ["convnext"])


def test_expect_error_can_fail():
    with pytest.raises(AssertionError, match="no InputError"), core.expect_error(InputError):
        pass
    with pytest.raises(AssertionError, match="lacks"), core.expect_error(InputError, "remedy"):
        raise InputError("something else")
    with pytest.raises(KeyError), core.expect_error(InputError):
        raise KeyError("another kind")


def test_keyed_seed_by_hand():
    digest = hashlib.sha256(b'[0, "crop", 5]').digest()
    assert core.keyed_seed(0, "crop", 5) == int.from_bytes(digest[:8], "big") >> 1


@given(st.integers(0, 10**9), keys, keys)
def test_draws_depend_on_the_name_alone(seed, first, second):
    draw = lambda key: torch.rand(4, generator=core.keyed_generator(seed, *key))  # noqa: E731
    assert torch.equal(draw(first), draw(first))
    assert (first == second) == (core.keyed_seed(seed, *first) == core.keyed_seed(seed, *second))


def test_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    core.keyed_generator(0, "a")
    assert torch.equal(before, torch.get_rng_state())


@given(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(), st.booleans(), st.none())))
def test_the_hash_ignores_order(values):
    assert core.stable_hash(values) == core.stable_hash(dict(reversed(values.items())))
    assert core.stable_hash(values) == hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    target = core.atomic_write(tmp_path / "a.txt", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(StoreError, match="No space left.*Free some space"):
        core.atomic_write(target, "new")
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), core.atomic_folder(tmp_path / "a") as temporary:
        (temporary / "half").write_text("x")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_unpacking_stays_inside(tmp_path):
    for name in ("../out.txt", "/abs.txt"):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
            file.writestr(name, "x")
        with pytest.raises(DataError, match="Fetch the archive again"):
            core.unpack_zip(tmp_path / "bad.zip", tmp_path / "out")
    (tmp_path / "torn.zip").write_bytes(b"PK half")
    with pytest.raises(DataError, match="not a whole zip file"):
        core.unpack_zip(tmp_path / "torn.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_root_is_found_from_below(tmp_path, monkeypatch):
    (tmp_path / "nbs" / "results").mkdir(parents=True)
    (tmp_path / "patchmix_repro").mkdir()
    (tmp_path / "settings.ini").touch()
    monkeypatch.chdir(tmp_path / "nbs" / "results")
    assert core.project_root() == tmp_path


FAULTS = """
import resource, sys
import torch
from patchmix_repro.core import keep_memory
if sys.argv[1] == "keep" and not keep_memory():
    sys.exit("no mallopt")
blocks = lambda: [torch.ones(10 * 2**20) for _ in range(2)]
blocks(), blocks()
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[20:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_kept_memory_causes_no_page_faults():
    "Rounds of two blocks of 40 MB, which glibc always maps (above 32 MB): handed back, their pages come again every round; kept, they stop coming. The heap grows for some rounds, for an aligned block needs slack beside the one it replaces."
    faults = {mode: subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True) for mode in ("plain", "keep")}
    if "no mallopt" in faults["keep"].stderr:
        pytest.skip("this C library has no mallopt")
    assert int(faults["keep"].stdout) < 2 <= int(faults["plain"].stdout)  # a block has at least one page


def test_keep_memory_without_a_switch(monkeypatch):
    "Another C library changes nothing and is no error."
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_memory() is False
