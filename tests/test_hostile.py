"""Hostile files: whatever config, run or prepared data hold, no code runs and nothing is written
outside of the run; the command ends soon, in one line that a terminal can show."""

import shutil

import pytest
from hostile import CASES, make_place, wrongs_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("hostile") / "made"
    make_place(place)
    return place


@pytest.mark.timeout(60)  # a pipe is not waited for, a device not read to its end
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.quick])
def test_a_hostile_file_runs_nothing_writes_nothing_outside_and_ends_in_one_line(
    made, tmp_path, name
):
    place = shutil.copytree(made, tmp_path / "place")
    config = place / "runs/run/config.toml"
    config.write_text(config.read_text().replace(str(made), str(place)))
    assert wrongs_of(CASES[name], place) == []
