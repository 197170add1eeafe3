"""What the benchmarks claim about themselves."""

import sys
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from truestep import GPT, Batch
from truestep.config import RunConfig
from truestep.settings import validate
from truestep.training.probe import probe

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
sys.path.append(str(Path(__file__).parent.parent / "docs"))

from data_order import check_epochs, check_mixture, check_prefixes
from make_recipes import NANOGPT, rows_of
from recipe import BASE, CONFIGS, best, merged, wanted
from time_to_loss import wanted as races
from workloads import WORKLOADS


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_the_model_of_a_workload_computes_what_the_formula_says(name):
    workload = WORKLOADS[name]
    with FakeTensorMode():
        model = GPT(workload.config())
        tokens = torch.zeros(1, workload.context_length, dtype=torch.long)
    facts = probe(model, Batch(tokens, tokens))
    assert facts.flops_per_token * workload.tokens == pytest.approx(workload.flops, rel=0.01)


def test_both_optimizers_have_as_many_tries_of_settings_that_exist():
    assert len(CONFIGS["muon"]) == len(CONFIGS["adamw"]) == 16
    base = tomllib.loads(BASE.read_text())
    for group, configs in CONFIGS.items():
        for settings in configs.values():
            resolved = validate(RunConfig, {"": merged(base, settings)})
            assert resolved.training.optimizer == {"without": "muon"}.get(group, group)


def test_the_best_trials_are_those_of_least_bits_on_the_first_seed():
    rows = [("a", 0, 1.5), ("b", 0, 1.3), ("b", 1, 9.0), ("c", 0, 1.4), ("d", 1, 1.0)]
    results = [
        {"group": "muon", "name": name, "seed": seed, "bits_per_byte": bits}
        for name, seed, bits in rows
    ]
    assert best(results, "muon", 2) == ["b", "c"]
    assert best(results, "adamw", 2) == []


def test_a_trial_is_made_again_only_where_its_settings_changed():
    options = Namespace(
        groups=["muon"], names=["start"], best=None, seeds=[0, 1], threads=1, data="stdlib"
    )
    first, second = wanted(options, [])
    assert (first["seed"], second["settings"]["training"]["seed"]) == (0, 1)
    assert list(wanted(options, [{**first, "bits_per_byte": 1.3}])) == [second]
    first["settings"]["training"]["num_steps"] += 1
    assert len(list(wanted(options, [first, second]))) == 1


@pytest.mark.parametrize("path", sorted(BASE.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_made_of_settings_that_exist(path):
    validate(RunConfig, {str(path): tomllib.loads(path.read_text())})


def test_a_run_of_nanogpt_serves_all_targets_and_each_of_ours_has_a_schedule_for_one():
    variants = ["truestep", "truestep compiled", *NANOGPT, "litgpt"]
    options = Namespace(data=Path(__file__), minutes=30, variants=variants)
    options.targets, options.own_steps, options.seeds = [1.73, 1.5], [200, 1000], [0, 1]
    options.own_rows = [4, 12]
    trials = [(t["variant"], t["steps"], t["targets"]) for t in races(options) if t["seed"] == 1]
    own = [trial for trial in trials if trial[0].startswith("truestep")]
    assert [trial[1:] for trial in own] == [(200, [1.73])] * 2 + [(1000, [1.5])] * 2
    assert [trial[1:] for trial in trials if trial[0] in NANOGPT] == [
        (2000, [1.73, 1.5]),
        (5000, [1.73, 1.5]),
    ]
    assert ("litgpt", 2000, [1.73, 1.5]) in trials


def test_the_factor_over_nanogpt_is_a_bound_where_it_did_not_get_there():
    def trials(variant, seconds, reached=True):
        own = {"variant": variant, "target": 1.5, "steps_made": 9, "reached": reached}
        return [{**own, "seconds": value} for value in seconds]

    first, second = NANOGPT
    own = trials("truestep", [10, 12, 20])
    slow = trials(first, [60, 61, 90])
    bound = trials(second, [100, 100, 100], reached=False)
    short = trials(first, [50], reached=False)
    for others, factor in ((slow + bound, "5.1"), (short + bound, "> 8.3"), ([], "")):
        (row,) = [r for r in rows_of(own + others) if r.startswith("| truestep |")]
        assert row == f"| truestep | 1.5 | 3 | 12 (10 to 20) | 9 | {factor} |\n"
    rows = list(rows_of(trials("truestep", [1800], reached=False) + slow))
    assert rows[0] == "| truestep | 1.5 | 1 | > 1,800 (1,800 to 1,800) | 9 |  |\n"


def test_order_and_mixing_are_exact_at_two_trillion_tokens():
    """As in docs/data.md, but for the files and the whole of the epochs."""
    assert check_prefixes()["largest_error_in_windows"] <= 1 - 1 / 6  # of four sources
    assert check_mixture(200) == {"mixed_windows": 200 * 512, "whole_epochs_in_them": 6}
    assert check_epochs(10**9) == {"windows_in_whole_epochs": 488_284}
