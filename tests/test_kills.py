"""A run that is killed, really killed, at any moment: it ends as the run that nobody killed does.

The harness is `kills.py`; it runs as a process of its own, that has computed nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from victims import SAVING, TRAINING

KILLS = 200


@pytest.fixture(scope="module")
def found():
    """What the harness found, in its own words."""
    command = [sys.executable, Path(__file__).with_name("kills.py"), "--kills", str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.xdist_group("kills")
def test_a_kill_before_or_inside_any_operation_of_a_save_leaves_the_old_or_the_new(found):
    sweep = found["sweep"]
    assert sweep["failures"] == []
    assert sweep["laws"] == {"broken": 0}
    assert sweep["attempts"]["kill"] == sum(sweep["kills_by_phase"].values()) > 60
    once_a_save = {"rename", "prune: rename", "prune: remove", "prune: half a remove"}
    assert {phase: sweep["kills_by_phase"][phase] for phase in once_a_save} == dict.fromkeys(
        once_a_save, 2
    )  # in the foreground and in the background
    assert sweep["kills_by_phase"]["write"] == sweep["kills_by_phase"]["half a write"] > 10


@pytest.mark.xdist_group("kills")
def test_a_run_killed_at_random_loses_no_commit_and_ends_with_the_bits_of_one_never_killed(found):
    random = found["random"]
    assert random["failures"] == []
    assert set(random["laws"].values()) == {0}
    assert random["distinct_final_hashes"] == {"adamw": 1, "muon": 1}
    assert random["runs_finished"] >= 2
    assert random["kills"] >= KILLS


@pytest.mark.xdist_group("kills")
def test_the_kills_land_in_every_phase_of_training_and_of_saving(found):
    random = found["random"]
    assert random["kills_by_phase"].keys() == set(TRAINING)
    assert random["saves_killed_by_phase"].keys() == set(SAVING)
    phases = random["kills_by_phase"] | random["saves_killed_by_phase"]
    assert [phase for phase, kills in phases.items() if kills == 0] == []
    assert random["commits_before_kills"] > 0
