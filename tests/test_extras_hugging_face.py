"""Datasets of the library `datasets`. Skipped where the extra `data` is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_extras_formats import NEEDED
from test_formats import held_out, jsonl, many, run
from test_prepare import texts_of

from truestep.data.corpus import find_files
from truestep.data.formats import CorpusError

datasets = pytest.importorskip("datasets", reason=NEEDED)


@pytest.fixture
def saved(tmp_path):
    """Save these texts, in several files, and return the directory."""

    def build(texts, name="saved"):
        datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))}).save_to_disk(
            tmp_path / name, num_shards=3
        )
        return str(tmp_path / name)

    return build


def test_a_saved_dataset_is_read_row_by_row_in_its_order(saved, tmp_path):
    lines = many()
    prepared, _ = run(saved(lines), tmp_path / "out", workers=2, part_bytes=3000)
    train = texts_of(prepared.train, text_by_name=True)
    assert list(train.values()) == [line for line in lines if line not in held_out(lines)]
    assert set(texts_of(prepared.validation)) == held_out(lines)
    assert all(name.startswith("data-0000") for name in train)


def test_a_selection_is_saved_as_what_was_selected(saved, tmp_path):
    lines = many()
    dataset = datasets.load_from_disk(saved(lines)).select(range(250, 50, -1))
    dataset.save_to_disk(tmp_path / "selected")
    texts = [r.text for file in find_files(str(tmp_path / "selected")) for r in file.documents()]
    assert texts == lines[250:50:-1]


def test_of_several_splits_one_must_be_named(tmp_path):
    split = datasets.Dataset.from_dict({"text": many(20)})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "all")
    with pytest.raises(CorpusError, match=r"has the splits 'train', 'test'; give one .*all/train'"):
        find_files(str(tmp_path / "all"))
    assert len(find_files(str(tmp_path / "all" / "test"))) == 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "its state is damaged"),
        ("[]", "its state is damaged"),
        ('{"_data_files": [{"filename": "../other.arrow"}]}', "names files elsewhere"),
        ('{"_data_files": [{"filename": "absent.arrow"}]}', r"absent\.arrow"),
    ],
)
def test_a_damaged_state_is_named(saved, tmp_path, state, message):
    place = saved(many(20))
    Path(place, "state.json").write_text(state)
    with pytest.raises(CorpusError, match=message):
        run(place, tmp_path / "out")


def test_rows_that_were_cut_short_are_named(saved, tmp_path):
    place = saved(many())
    path = Path(place, "data-00001-of-00003.arrow")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CorpusError, match=r"data-00001-of-00003\.arrow' is cut short, damaged"):
        run(place, tmp_path / "out")


@pytest.mark.parametrize("name", ["hf:", "hf:a:", "hf:a:b:c:d", "hf:a::b"])
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(CorpusError, match="must be hf:NAME, hf:NAME:SPLIT or"):
        find_files(name)


def command(tmp_path, source, **environ):
    environ = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"} | environ
    return subprocess.run(
        [sys.executable, "-m", "truestep", "prepare", source, "--out", str(tmp_path / "out")],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_name_without_a_network_is_refused_in_one_line(tmp_path):
    done = command(tmp_path, "hf:nobody/nothing")
    assert done.returncode == 2
    assert "error: source: 'hf:nobody/nothing' cannot be had (" in done.stderr
    assert "is there a network?" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_a_name_stands_for_is_read_from_the_arrow_files_of_the_library(tmp_path):
    """A directory of files is a name, too, to the library: no network is needed."""
    lines = many()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "test.jsonl").write_text(jsonl(lines))
    done = command(tmp_path, "hf:./corpus:test")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["train"]["num_documents"] == len(lines) - len(held_out(lines))
