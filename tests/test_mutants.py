"""Every bug of `make mutants` can still be planted, and what it breaks is still tested."""

import ast
import json
from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT, plant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_the_bug_can_be_planted_and_its_tests_are_there(mutant, tmp_path):
    path = tmp_path / mutant.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((ROOT / "src/truestep" / mutant.file).read_text())
    plant(mutant, tmp_path)
    ast.parse(path.read_text())
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = Path(ROOT, "tests", file).read_text()
        assert not name or f"def {name}(" in text


def test_what_was_planted_last_is_what_can_be_planted():
    rows = json.loads((ROOT / "docs" / "mutants.json").read_text())
    assert [(row["bug"], row["file"]) for row in rows] == [(m.bug, m.file) for m in MUTANTS]
    assert f" {len(rows)} planted bugs" in (ROOT / "README.md").read_text()
