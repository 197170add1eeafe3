"""A compiler that was killed leaves half a library, which must not spoil every later run."""

import _ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from truestep.compile_cache import discard_cut_libraries

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF is Linux's")


@pytest.fixture
def library(tmp_path):
    """A real library in a cache laid out as torch's."""
    path = tmp_path / "ab" / "cabc.main.so"
    path.parent.mkdir()
    (tmp_path / "locks").mkdir()
    shutil.copy(_ctypes.__file__, path)
    return path


def test_a_library_that_was_cut_anywhere_goes_and_a_whole_one_stays(tmp_path, library):
    data = library.read_bytes()
    assert discard_cut_libraries(tmp_path) == []
    for size in [0, 3, 63, 64, 1000, *range(0, len(data), len(data) // 40), len(data) - 1]:
        library.write_bytes(data[:size])
        assert discard_cut_libraries(tmp_path) == [library]
        assert not library.exists()
    library.write_bytes(bytes(len(data)))  # a size without content, as after a power loss
    assert discard_cut_libraries(tmp_path) == [library]


def test_a_library_that_another_process_is_writing_stays(tmp_path, library):
    library.write_bytes(library.read_bytes()[:100])
    with FileLock(tmp_path / "locks" / "cabc.lock"):
        assert discard_cut_libraries(tmp_path) == []
    assert discard_cut_libraries(tmp_path) == [library]


TRAIN = """
import torch
from truestep import Trainer, TrainingConfig
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(7, 8), torch.nn.Linear(8, 7))
trainer = Trainer(model, TrainingConfig(precision="float32", compile="on"), sinks=[])
print([trainer.training_step(torch.arange(15).reshape(3, 5) % 7).loss for _ in range(2)])
"""


def test_a_run_compiles_anew_what_a_kill_cut_short(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def train():
        command = [sys.executable, "-W", "error::UserWarning", "-c", TRAIN]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    losses = train()
    libraries = list(Path(tmp_path).glob("*/*.so"))
    assert libraries
    for number, path in enumerate(libraries):
        path.write_bytes(path.read_bytes()[: 1000 * (number % 2)])
    assert train() == losses
