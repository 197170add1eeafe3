"""What the benchmarks claim about themselves."""

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from truestep import GPT, Batch
from truestep.training.probe import probe

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from workloads import WORKLOADS


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_the_model_of_a_workload_computes_what_the_formula_says(name):
    workload = WORKLOADS[name]
    with FakeTensorMode():
        model = GPT(workload.config())
        tokens = torch.zeros(1, workload.context_length, dtype=torch.long)
    facts = probe(model, Batch(tokens, tokens))
    assert facts.flops_per_token * workload.tokens == pytest.approx(workload.flops, rel=0.01)
