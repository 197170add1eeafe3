"""Plant the bugs that others have shipped, one at a time, and see the suite go red: `make mutants`.

Each is planted in a copy of the source, and the tests that must catch it run against the copy.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """A bug: what it is, the text of the source it replaces, and the tests that must fail."""

    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(
        "mean of means over micro-batches",
        "training/step.py",
        "self._forward_backward(micro_batch, num_tokens)",
        "self._forward_backward(micro_batch, micro_batch.num_targets * "
        "-(-len(batch.tokens) // self.micro_batch_size(batch)))",
        ("test_step.py",),
    ),
    Mutant(
        "mean of means over ranks (each share by its own count)",
        "loss.py",
        "    if num_tokens is None:\n",
        "    if True:\n",
        ("test_step.py::test_shares_of_a_batch_on_several_ranks_add_up_to_the_whole_batch",),
    ),
    Mutant(
        "mean of means over processes: each divides by its own count",
        "training/step.py",
        "self._exchange(batch, on_device.num_targets)",
        "self._exchange(batch, on_device.num_targets) "
        '| {"num_tokens": on_device.num_targets * self.processes.size}',
        ("test_parallel.py",),
    ),
    Mutant(
        "gradients averaged over processes instead of summed",
        "training/reduction.py",
        "dist.all_reduce(bucket.buffer(), async_op=True)",
        "dist.all_reduce(bucket.buffer().div_(self._processes.size), async_op=True)",
        ("test_parallel.py",),
    ),
    Mutant(
        "exact sums in the order of processes, not in pairs of pairs",
        "training/reduction.py",
        "self._processes.sum_in_pairs(bucket.buffer())",
        "dist.all_reduce(bucket.buffer())",
        ("test_parallel.py",),
    ),
    Mutant(
        "exact sums of one process in the order of its micro-batches",
        "training/reduction.py",
        "if number % in_lane == 0:",
        "if False:",
        ("test_parallel.py",),
    ),
    Mutant(
        "uneven last window: padding is trained on",
        "data/loader.py",
        "np.full(shape, IGNORE_INDEX, dtype=np.int64)",
        "np.zeros(shape, dtype=np.int64)",
        ("test_loader.py",),
    ),
    Mutant(
        "uneven last window: its tokens are dropped",
        "data/loader.py",
        "return -(-(len(split) - 1) // context_length)",
        "return (len(split) - 1) // context_length",
        ("test_loader.py",),
    ),
    Mutant(
        "randomness not part of what is saved: dropout differs after a resume",
        "training/forward.py",
        "runtime.seeded(self._device, self._config.seed, step, part.index),",
        "runtime.random_state_kept(self._device),",
        ("test_resume.py",),
    ),
    Mutant(
        "iter() before the position is restored: data replayed after a resume",
        "training/trainer.py",
        "data, self.step, resumed=resumed, processes",
        "data, 0, resumed=resumed, processes",
        ("test_resume.py",),
    ),
    Mutant(
        "visible before the data is durable: files are not synced",
        "storage.py",
        "        storage.sync(descriptor)\n",
        "",
        ("test_power_loss.py",),
    ),
    Mutant(
        "visible before the data is durable: renamed before the manifest is written",
        "manifest.py",
        "        write_file(self.storage, self.temporary / MANIFEST, [text.encode()])\n"
        "        self.storage.sync_directory(self.temporary)\n"
        "        self.storage.rename(self.temporary, self.target)\n",
        "        self.storage.rename(self.temporary, self.target)\n"
        "        write_file(self.storage, self.target / MANIFEST, [text.encode()])\n"
        "        self.storage.sync_directory(self.target)\n",
        ("test_checkpoint.py::test_whatever_fails_in_a_save_the_newest_is_the_old_or_the_new",),
    ),
    Mutant(
        "commit not durable: the parent directory is not synced",
        "manifest.py",
        "        self.storage.sync_directory(self.target.parent)\n",
        "",
        ("test_power_loss.py",),
    ),
    Mutant(
        "swallowed writer error",
        "checkpoint/writer.py",
        "            in_flight.result()\n",
        "            in_flight.exception()\n",
        ("test_writer.py",),
    ),
    Mutant(
        "weight decay on norms",
        "training/optim.py",
        '"weight_decay": 0.0}',
        '"weight_decay": weight_decay}',
        ("test_step.py",),
    ),
    Mutant(
        "learning rate 0 on the first step",
        "training/schedule.py",
        "min((step + 1) / warmup_steps, 1.0)",
        "min(step / warmup_steps, 1.0)",
        ("test_fit.py",),
    ),
    Mutant(
        "one update too many",
        "training/trainer.py",
        "if self.step >= end or self.stopping:",
        "if self.step > end or self.stopping:",
        ("test_fit.py",),
    ),
    Mutant(
        "best checkpoint overwritten by a worse one",
        "checkpoint/commit.py",
        "in sorted(group)]",
        "in sorted(group, reverse=True)]",
        ("test_writer.py",),
    ),
    Mutant(
        "evaluation consumes training's randomness",
        "training/evaluate.py",
        "modes, random_state_kept(device), torch.no_grad()",
        "torch.no_grad()",
        ("test_fit.py",),
    ),
    Mutant(
        "ids over 65535 wrap in uint16",
        "data/tokens.py",
        'return "uint16" if vocab_size <= 2**16 else "uint32"',
        'return "uint16"',
        ("test_tokens.py",),
    ),
    Mutant(
        "_orig_mod. in saved names",
        "checkpoint/snapshot.py",
        'if part != "_orig_mod" and prefix not in wrapped',
        "if prefix not in wrapped",
        ("test_checkpoint.py",),
    ),
    Mutant(
        "module. in saved names",
        "checkpoint/snapshot.py",
        'if part != "_orig_mod" and prefix not in wrapped',
        'if part != "_orig_mod"',
        ("test_checkpoint.py",),
    ),
    Mutant(
        "tokens per second over a clock that includes evaluation",
        "training/trainer.py",
        "        self._clock = time.perf_counter()  # what companions took is no part of a step\n",
        "",
        ("test_fit.py",),
    ),
    Mutant(
        "tokens per second over an earlier session, too",
        "observe/display.py",
        "        if self._warm:\n            self._recent.append",
        "        if True:\n            self._recent.append",
        ("test_display.py",),
    ),
    Mutant(
        "a documented option nobody reads",
        "config.py",
        "    micro_batch_size: PositiveInt",
        '    label_smoothing: float = trajectory(0.0, ge=0, lt=1)\n    """Share of the target '
        'spread over all tokens."""\n\n    micro_batch_size: PositiveInt',
        ("test_house_rules.py",),
    ),
    # Beyond those that others shipped: what this project promises on top.
    Mutant(
        "a checkpoint knows more than the log",
        "workflows/session.py",
        "before_commit=self._log.sync,",
        "before_commit=lambda: None,",
        ("test_disk_full.py",),
    ),
    Mutant(
        "a validation that a signal cut off is never made up for",
        "workflows/train.py",
        "            session.catch_up()\n",
        "",
        (
            "test_cli.py::test_a_validation_that_a_signal_cut_off_is_made_up_for_and_ranks_its_checkpoint",
        ),
    ),
    Mutant(
        "the state is not copied before training goes on",
        "checkpoint/writer.py",
        "take_snapshot(trainer, facts, validation).staged()",
        "take_snapshot(trainer, facts, validation)",
        ("test_writer.py",),
    ),
    Mutant(
        "a manifest's seal is not compared",
        "manifest.py",
        "    if not sealed:\n",
        "    if False:\n",
        ("test_storage.py", "test_checkpoint.py"),
    ),
    Mutant(
        "a non-finite step updates the parameters",
        "training/guard.py",
        "self._halted | ~finite | ~counts, self._halted",
        "self._halted | ~counts, self._halted",
        ("test_step.py",),
    ),
    Mutant(
        "thread count not kept on resume",
        "config.py",
        'threads: Annotated[int, Field(gt=0, le=1024)] | Literal["auto"] = trajectory("auto")',
        'threads: Annotated[int, Field(gt=0, le=1024)] | Literal["auto"] = cosmetic("auto")',
        ("test_replay.py::test_the_number_of_threads_is_kept_and_applied_again",),
    ),
    Mutant(
        "memory ended: the step is made again over buffers that the failed one had updated",
        "training/trainer.py",
        "                self._buffers.restore(buffers)\n                clear_gradients",
        "                clear_gradients",
        ("test_accelerator_memory.py",),
    ),
    Mutant(
        "memory ended: a step that had begun its update is made again",
        "training/trainer.py",
        "                if self.mid_update:\n                    raise\n",
        "",
        ("test_accelerator_memory.py",),
    ),
    Mutant(
        "memory ended: smaller micro-batches are not written down",
        "training/trainer.py",
        "        self.when_resized()\n",
        "",
        ("test_accelerator_memory.py",),
    ),
    Mutant(
        "memory ended: a step in flight is not finished before the next is made again",
        "training/trainer.py",
        "            self._land(0)\n            self._resize",
        "            self._resize",
        ("test_accelerator_memory.py",),
    ),
    Mutant(
        "memory ended: smaller micro-batches are written down without a checkpoint before them",
        "workflows/session.py",
        "            self.save()\n            self._writer.wait()\n        config",
        "            pass\n        config",
        ("test_accelerator_memory.py",),
    ),
    Mutant(
        "a factor for embeddings that changes the head's rate",
        "training/compose.py",
        "    chosen = {id(parameter) for parameter in (*matrices, *embeddings)}\n",
        "    chosen = {id(parameter) for parameter in (*matrices, *embeddings)}\n"
        "    config = config.model_copy(update={'learning_rate': config.learning_rate "
        "* config.embedding_learning_rate_factor})\n",
        ("test_step.py",),
    ),
    Mutant(
        "a plan for a GPU at its full rate",
        "training/estimate.py",
        "ASSUMED_UTILIZATION * ",
        "",
        ("test_plan.py",),
    ),
]


def plant(mutant: Mutant, source: Path) -> None:
    """Replace the text in a copy of the source; it must stand there exactly once."""
    path = source / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.bug}: {mutant.file} has its text {text.count(mutant.old)} times")
    path.write_text(text.replace(mutant.old, mutant.new))


def run_tests(source: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run tests against a copy of the source; return pytest's exit code and its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]
    environment = {**os.environ, "PYTHONPATH": str(source.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def judge(mutant: Mutant) -> str | None:
    """Plant a bug and return the test that caught it, None if all passed."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        source = Path(directory, "truestep")
        shutil.copytree(ROOT / "src/truestep", source, ignore=shutil.ignore_patterns("__pycache__"))
        plant(mutant, source)
        code, output = run_tests(source, mutant.tests)
    if code == 0:
        return None
    failed = re.search(r"^FAILED tests/(\S+)", output, flags=re.MULTILINE)
    if code != 1 or failed is None:  # not a test that failed, but tests that could not run
        raise RuntimeError(f"{mutant.bug}: the tests did not run:\n{output[-2000:]}")
    return failed[1]


def main() -> int:
    """Judge every bug, print a table and write it; 1 if one was not caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="bugs whose text contains this")
    parser.add_argument("--output", type=Path, help="a JSON file for the table")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.bug]
    tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    code, output = run_tests(ROOT / "src/truestep", tests)
    if code:
        print(f"the tests fail before anything is planted:\n{output[-2000:]}")
        return 1
    rows = []
    for mutant in chosen:
        start = time.monotonic()
        caught_by = judge(mutant)
        seconds = time.monotonic() - start
        rows.append({"bug": mutant.bug, "file": mutant.file, "caught_by": caught_by})
        print(
            f"{'caught' if caught_by else 'MISSED':7}{mutant.bug} ({mutant.file}, {seconds:.0f} s)"
        )
        print(f"       {caught_by or 'every test passed'}", flush=True)
    missed = sum(row["caught_by"] is None for row in rows)
    print(f"{len(rows)} bugs planted, {len(rows) - missed} caught")
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
