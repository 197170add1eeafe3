"""A run that is killed, really killed, at any moment: it ends as the run that nobody killed does.

`kills.py` and `sweep.py` run as processes of their own, that have computed nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

from victims import SAVING, TRAINING

KILLS = 200


def run(script, *arguments):
    """What a harness found, in its own words."""
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_kill_before_or_inside_any_operation_of_a_save_leaves_the_old_or_the_new():
    found = run("sweep.py")
    assert found["failures"] == []
    assert found["laws"] == {"broken": 0}
    kills = found["kills_by_phase"]
    assert found["attempts"]["kill"] == sum(kills.values()) > 60
    for once_a_save in ("rename", "prune: rename", "prune: remove", "prune: half a remove"):
        assert kills[once_a_save] == 2  # in the foreground and in the background
    assert kills["write"] == kills["half a write"] > 10


def test_a_run_killed_in_every_phase_loses_no_commit_and_ends_with_the_bits_of_one_never_killed():
    found = run("kills.py", "--kills", str(KILLS))
    assert found["failures"] == []
    assert set(found["laws"].values()) == {0}
    assert found["distinct_final_hashes"] == {"adamw": 1, "muon": 1}
    assert found["runs_finished"] >= 2
    assert found["kills"] >= KILLS
    assert found["commits_before_kills"] > 0
    # That they landed everywhere: half of them are sent to a victim that waits in a phase.
    assert found["kills_by_phase"].keys() == set(TRAINING)
    assert found["saves_killed_by_phase"].keys() == set(SAVING)
    phases = found["kills_by_phase"] | found["saves_killed_by_phase"]
    assert [phase for phase, kills in phases.items() if kills == 0] == []
