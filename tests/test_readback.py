"""Numbers on their way from the device."""

import torch

from truestep.training.readback import Readback


def test_numbers_come_back_as_they_are():
    readback = Readback(
        loss=torch.tensor(1 / 3), num_tokens=torch.tensor(2**40), skipped=torch.tensor(True)
    )
    numbers = readback.read()
    assert numbers == {"loss": float(torch.tensor(1 / 3)), "num_tokens": 2**40, "skipped": True}
    assert [type(number) for number in numbers.values()] == [float, int, bool]
