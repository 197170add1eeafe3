"""The list of documents: looked up as a plain search through all of it would, in little memory."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.data import document_list
from truestep.data.document_list import DocumentList
from truestep.storage import LOCAL, StorageError, write_file


def write(path, entries):
    path.unlink(missing_ok=True)
    lines = "".join(json.dumps({"name": name, "start": start}) + "\n" for name, start in entries)
    return DocumentList(path, write_file(LOCAL, path, [lines.encode()]), len(entries))


@given(
    starts=st.sets(st.integers(1, 200), max_size=40),
    stride=st.integers(1, 9),
    positions=st.lists(st.integers(0, 250), min_size=1),
)
@settings(deadline=None)
def test_the_document_at_a_position_is_the_last_one_that_starts_there_or_before(
    tmp_path_factory, starts, stride, positions
):
    entries = [(f"naïve {start}", start) for start in sorted({0, *starts})]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_list, "_STRIDE", stride)
        found = write(tmp_path_factory.getbasetemp() / "x-documents.jsonl", entries)
        for position in positions:
            assert found.at(position) == [e for e in entries if e[1] <= position][-1]


@pytest.mark.parametrize("starts", [[1], [0, 0], [0, 5, 4], [], [0, 2**70], [-1, 0]])
def test_starts_that_do_not_rise_from_0_are_refused(tmp_path, starts):
    found = write(tmp_path / "x-documents.jsonl", [("a", start) for start in starts])
    with pytest.raises(StorageError, match=rf"expected {len(starts)} documents with rising starts"):
        found.at(0)


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path):
    number = 100_000
    found = write(tmp_path / "x-documents.jsonl", [(f"file:{i}", 7 * i) for i in range(number)])
    tracemalloc.start()
    try:
        assert found.at(7 * 77_777 + 3) == ("file:77777", 7 * 77_777)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 2**20  # of which 2 MiB are verifying; the list itself would take 12
