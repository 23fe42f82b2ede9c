"The store: whole records or none, two writers, spoilt parts, publishing."
import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmix_repro import store
from patchmix_repro.core import InputError, NonFiniteError, StoreError

IMAGES = pd.DataFrame({"id": [0, 1], "file": ["a.png", "b.png"], "correct": [True, False], "margin": [0.5, None]})


def record(seed=0, **changes):
    given = {"data": {"test": "ab" * 32}, "metrics": {"top1": 0.5, "n": 2}, "timings": {"train_s": 1.5}}
    return store.new_record("train", {"model": "swin", "seed": seed}, seed=seed, **{**given, **changes})


def test_a_record_comes_back_as_it_went_in(tmp_path):
    store.append(record(tables={"images": IMAGES, "empty": IMAGES[:0]}, attachments={"x.png": b"\x00\xff", "y": b""}), tmp_path)
    row = store.read(tmp_path).iloc[0]
    assert (row["kind"], row["seed"], row["metrics.top1"], row["metrics.n"]) == ("train", 0, 0.5, 2)
    assert row["config.model"] == "swin" and row["data.test"] == "ab" * 32 and row["timings.train_s"] == 1.5
    assert row["provenance"] == json.loads(json.dumps(store.provenance()))
    back = store.read_table(tmp_path, "images")
    assert back.pop("run_id").tolist() == [row["run_id"]] * 2
    pd.testing.assert_frame_equal(back, IMAGES)
    assert len(store.read_table(tmp_path, "empty")) == 0
    assert store.attachment(tmp_path, row["run_id"], "x.png") == b"\x00\xff"
    assert store.attachment(tmp_path, row["run_id"], "y") == b""


def test_any_parquet_reader_opens_a_part(tmp_path):
    part = store.append(record(tables={"images": IMAGES}), tmp_path)
    row = pq.read_table(part).to_pylist()[0]
    assert row["metrics"] == {"top1": 0.5, "n": 2}
    assert row["tables"]["images"][1] == {"id": 1, "file": "b.png", "correct": False, "margin": None}
    assert json.loads(row["config"]) == {"model": "swin", "seed": 0}


def test_the_seal_is_the_hash_of_the_file_with_its_digits_zeroed(tmp_path):
    # attachments may quote the seal's own mark; the footer's comes last
    part = store.append(record(attachments={"quote": b"patchmix_repro-sha256:" + b"7" * 64}), tmp_path)
    content = part.read_bytes()
    seal = pq.read_metadata(part).metadata[b"seal"].decode().split(":")[1]
    at = content.rindex(seal.encode())
    assert hashlib.sha256(content[:at] + b"0" * 64 + content[at + 64 :]).hexdigest() == seal
    assert part.name == f"train-{record()['run_id']}-{seal[:8]}.parquet"


def test_the_same_record_twice_is_one_file(tmp_path):
    assert store.append(record(), tmp_path) == store.append(record(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_name_of_a_run_does_not_depend_on_where_it_goes():
    here, there = ({"model": "swin", "lr": 0.1, "out": out, "root": out, "resume": out == "a"} for out in "ab")
    assert store.config_hash(here) == store.config_hash(there)
    records = [store.new_record("train", c, seed=0, data={}, metrics={}) for c in (here, there)]
    assert records[0]["run_id"] == records[1]["run_id"] and store.encode(records[0]) == store.encode(records[1])
    other = store.new_record("train", here, seed=1, data={}, metrics={})
    assert other["run_id"] != records[0]["run_id"]


def test_config_hash_by_hand():
    text = '{"lr":0.1,"ratio":[0.0,0.5]}'
    assert store.config_hash({"ratio": (0.0, 0.5), "lr": 0.1, "out": "x"}) == hashlib.sha256(text.encode()).hexdigest()


def test_provenance_names_no_place_and_no_person():
    made = store.provenance()
    text = json.dumps(made)
    for private in (os.path.expanduser("~"), os.getcwd(), os.uname().nodename, sys.prefix):
        assert private not in text
    source = store.__file__
    with open(source, "rb") as file:
        assert made["modules"]["patchmix_repro.store"] == hashlib.sha256(file.read()).hexdigest()
    assert made["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


# what cannot be recorded
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(NonFiniteError, match="loss"):
        record(metrics={"loss": value})
    with pytest.raises(NonFiniteError, match="seconds"):
        record(timings={"seconds": value})
    with pytest.raises(InputError, match="JSON"):
        store.new_record("train", {"lr": value}, seed=0, data={}, metrics={})


def test_an_infinite_cell_is_refused_and_a_missing_one_kept():
    with pytest.raises(NonFiniteError, match="loss"):
        record(tables={"history": pd.DataFrame({"step": [1, 2], "loss": [0.1, float("inf")]})})


@pytest.mark.parametrize("changes, word", [
    ({"metrics": {"top1": "0.5"}}, "top1"),
    ({"metrics": {"top1": [0.5]}}, "top1"),
    ({"tables": {"images": pd.DataFrame()}}, "at least one"),
    ({"tables": {"images": pd.DataFrame([[1]])}}, "named by a string"),
    ({"attachments": {"x": "text"}}, "not bytes"),
    ({"run_id": "../escape"}, "file name"),
])
def test_a_record_that_makes_no_sense_is_refused(changes, word):
    with pytest.raises(InputError, match=word):
        record(**changes)


def test_config_must_be_json():
    with pytest.raises(InputError, match="JSON"):
        store.config_hash({"path": object()})
    with pytest.raises(InputError, match="asdict"):
        store.config_hash([1])


def test_a_column_of_two_types_is_refused(tmp_path):
    mixed = pd.DataFrame({"x": [1, "a"]}, dtype=object)
    with pytest.raises(InputError, match="one type"):
        store.append(record(tables={"t": mixed}), tmp_path)
    assert not list(tmp_path.iterdir())


# parts that cannot be trusted
def spoil_torn(part):
    part.write_bytes(part.read_bytes()[:-20])


def spoil_empty(part):
    part.write_bytes(b"")


def spoil_foreign(part):
    pd.DataFrame({"metrics.top1": [0.99]}).to_parquet(part)


def spoil_renamed(part):
    part.rename(part.with_name("train-best-00000000.parquet"))


def spoil_edited(part):
    # a well-meant edit with another tool, its metadata kept
    table = pq.read_table(part)
    edited = table.set_column(table.schema.get_field_index("seed"), "seed", [[7]])
    pq.write_table(edited.replace_schema_metadata(pq.read_metadata(part).metadata), part)


def test_what_a_reader_does_to_its_rows_stays_with_it(tmp_path):
    store.append(record(0, tables={"images": IMAGES}), tmp_path)
    first, table = store.read(tmp_path), store.read_table(tmp_path, "images")
    first.loc[0, "run_id"], table["correct"] = "other", False
    first["provenance"][0].clear()
    again = store.read(tmp_path)
    assert again["run_id"][0] != "other" and again["provenance"][0] and store.read_table(tmp_path, "images")["correct"].any()


@pytest.mark.parametrize("spoil, word", [
    (spoil_torn, "torn"), (spoil_empty, "torn"), (spoil_foreign, "foreign"), (spoil_renamed, "renamed"), (spoil_edited, "altered"),
])
def test_a_spoilt_part_is_named_and_never_read(tmp_path, spoil, word):
    good, bad = store.append(record(0), tmp_path), store.append(record(1), tmp_path)
    assert store.verify(tmp_path).empty and len(store.read(tmp_path)) == 2
    spoil(bad)
    problems = store.verify(tmp_path)
    assert len(problems) == 1 and word in problems["problem"][0] and problems["part"][0] != good.name
    with pytest.warns(store.StoreWarning, match=problems["part"][0]):
        assert store.read(tmp_path)["part"].tolist() == [good.name]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_bit_and_any_cut_is_noticed(data):
    content = store.encode(CHECKED)
    at = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.booleans())
    spoilt = content[:at] if cut else content[:at] + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        name = store.append(CHECKED, folder).name
        with open(f"{folder}/{name}", "wb") as file:
            file.write(spoilt)
        assert store.verify(folder)["part"].tolist() == [name]


CHECKED = record(tables={"images": IMAGES}, attachments={"x": b"1"})
NAMES = st.text("abcdefghij_", min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    config=st.dictionaries(NAMES, st.integers(-9, 9) | st.text(max_size=5) | st.booleans() | st.none(), max_size=4),
    metrics=st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    files=st.dictionaries(NAMES, st.binary(max_size=20), max_size=3),
)
def test_whatever_goes_in_comes_back(config, metrics, files):
    with tempfile.TemporaryDirectory() as folder:
        made = store.new_record("probe", config, seed=3, data={}, metrics=metrics, attachments=files)
        store.append(made, folder)
        row = store.read(folder).iloc[0]
        assert {name: row[f"metrics.{name}"] for name in metrics} == metrics
        assert row["config_hash"] == store.config_hash(config)
        assert all(store.attachment(folder, made["run_id"], name) == content for name, content in files.items())


def test_a_run_recorded_twice_is_told(tmp_path):
    store.append(record(), tmp_path)
    store.append(record(timings={"train_s": 9.0}), tmp_path)
    with pytest.warns(store.StoreWarning, match="recorded twice"):
        store.read(tmp_path)
    assert "same run" in store.verify(tmp_path)["problem"][0]


def test_a_copy_in_another_folder_is_the_same_record(tmp_path):
    part = store.append(record(), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / part.name).write_bytes(part.read_bytes())
    assert len(store.read(tmp_path)) == 1 and store.verify(tmp_path).empty


def test_temporary_files_of_a_killed_writer_are_not_read(tmp_path):
    part = store.append(record(), tmp_path)
    (tmp_path / f".{part.name}.abc.tmp").write_bytes(b"half")
    (tmp_path / ".checkpoint.tmp").mkdir()
    (tmp_path / ".checkpoint.tmp" / "x.parquet").write_bytes(b"half")
    assert len(store.read(tmp_path)) == 1


# writing
WRITER = """
import sys
from patchmix_repro import store
store.provenance = lambda: {}
who, folder = int(sys.argv[1]), sys.argv[2]
for i in range(25):
    store.append(store.new_record("train", {"i": i}, seed=who, data={}, metrics={"x": i}), folder)
    store.append(store.new_record("shared", {"i": i}, seed=0, data={}, metrics={"x": i}), folder)
"""


def test_two_writers_at_once_lose_nothing(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(who), str(tmp_path)]) for who in (1, 2)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    assert store.verify(tmp_path).empty
    records = store.read(tmp_path)
    assert records.groupby(["kind", "seed"]).size().to_dict() == {("shared", 0): 25, ("train", 1): 25, ("train", 2): 25}
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = store.append(record(0), tmp_path)
    monkeypatch.setattr(os, step, full)
    with pytest.raises(StoreError, match="Free some space"):
        store.append(record(1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="writable folder"):
        store.append(record(), tmp_path / "file" / "store")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_folder_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="writable folder"):
        store.append(record(), tmp_path)


# names
def test_wrong_names_get_the_nearest(tmp_path):
    made = record(run_id="swin-0", tables={"images": IMAGES}, attachments={"sheet.png": b"1"})
    store.append(made, tmp_path)
    for call in (
        lambda: store.read(tmp_path, kind="trains"), lambda: store.read_table(tmp_path, "image"),
        lambda: store.attachment(tmp_path, "swin-1", "sheet.png"), lambda: store.attachment(tmp_path, "swin-0", "shet.png"),
        lambda: store.publish(["swin-1"], tmp_path, tmp_path / "results"),
    ):
        with pytest.raises(InputError, match="did you mean"):
            call()
    assert not (tmp_path / "results").exists()


def test_no_store_is_an_error_and_an_empty_one_is_empty(tmp_path):
    with pytest.raises(StoreError, match="no such folder"):
        store.read(tmp_path / "none")
    assert store.read(tmp_path).empty and store.verify(tmp_path).empty


def test_attachments_of_two_records_must_agree(tmp_path):
    store.append(record(attachments={"x": b"1"}), tmp_path)
    store.append(record(attachments={"x": b"2"}), tmp_path)
    with pytest.raises(StoreError, match="2 different"):
        store.attachment(tmp_path, record()["run_id"], "x")


# publishing
def test_publish_copies_all_records_of_the_chosen_runs(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    parts = [store.append(record(seed), runs / str(seed)) for seed in (0, 1, 2)]
    ids = [record(seed)["run_id"] for seed in (0, 2)]
    published = store.publish(ids, runs, results)
    assert sorted(p.read_bytes() for p in published) == sorted(parts[i].read_bytes() for i in (0, 2))
    assert store.publish(ids, runs, results) == published  # once more changes nothing
    assert sorted(store.read(results)["seed"]) == [0, 2]


def test_publish_replaces_only_when_told(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    old = store.append(record(metrics={"top1": 0.5}), results)
    new = store.append(record(metrics={"top1": 0.6}), runs)
    with pytest.raises(StoreError, match="replace=True"):
        store.publish(record()["run_id"], runs, results)
    assert [p.name for p in results.iterdir()] == [old.name]
    store.publish(record()["run_id"], runs, results, replace=True)
    assert [p.name for p in results.iterdir()] == [new.name]


def test_publish_writes_to_the_results_of_the_project(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "project_root", lambda: tmp_path)
    store.append(record(), tmp_path / "runs")
    assert store.publish(record()["run_id"], tmp_path / "runs")[0].parent == tmp_path / "results"


def test_joined_frames_are_filed(tmp_path):
    "pandas keeps text in several pieces after a concat."
    parts = [pd.DataFrame({"file": ["a", "b"], "right": [True, False]}), pd.DataFrame({"file": ["c"], "right": [True]}), pd.DataFrame({"file": [], "right": []}, dtype=object)]
    for i, frame in enumerate((pd.concat(parts[:2], ignore_index=True), parts[2])):
        store.append(store.new_record("train", {"i": i}, seed=0, data={}, metrics={}, tables={"images": frame}), tmp_path / str(i))
    assert store.read_table(tmp_path / "0", "images").file.tolist() == ["a", "b", "c"] and store.read_table(tmp_path / "1", "images").empty
