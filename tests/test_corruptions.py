"""No damage is ever loaded: two thousand kinds of it here, a hundred thousand in `make torture`."""

import random

import pytest
from corruptions import OF_ONE_FILE, corrupt_checkpoint, corrupt_data, damages

from truestep.manifest import MANIFEST

COUNT = 2000


@pytest.mark.parametrize("corrupt", [corrupt_checkpoint, corrupt_data])
def test_whatever_is_damaged_is_refused_or_loads_as_it_was(corrupt):
    figures = corrupt(COUNT)
    assert figures["failures"] == []
    assert figures["laws"] == {"wrong_loads": 0}
    assert figures["attempts"] == figures["refused"] + figures["loaded_and_identical"] == COUNT
    assert figures["refused"] > 0.9 * COUNT  # the rest is white space and files that nobody reads
    assert figures["by_kind"].keys() > OF_ONE_FILE.keys()


def test_every_byte_of_the_manifest_is_damaged_once_and_every_damage_changes_something():
    good = {MANIFEST: bytes(range(100)), "a": b"first file", "b": b"second"}
    older = {"a": b"older", "b": b"too"}
    found = [change for _, change in damages(good, older, 500, random.Random(0))]
    assert len(found) == 500
    for position, change in enumerate(found[:100]):
        (data,) = change.values()
        differing = [at for at, byte in enumerate(data) if byte != good[MANIFEST][at]]
        assert differing == [position]
        assert bin(data[position] ^ position).count("1") == 1
    assert all(any(good.get(name) != data for name, data in c.items()) for c in found)
    assert {name for change in found for name in change} > good.keys()
