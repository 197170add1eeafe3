"""Seconds to a validation loss on a text's characters: truestep's recipes, nanoGPT, litgpt.

    python benchmarks/time_to_loss.py --data tinyshakespeare.txt --nanogpt PATH \\
        --targets 1.73 1.50 --seeds 0 1 2 --output docs/figures/time-to-loss.json

With `--variants`, only these; litgpt only so.

All have W3's layers and 256 characters of context and train on the first nine tenths. The clock
runs from before the model is built, when everything is imported, on the CPU, with the compiler's
cache empty or, where it is said to be warm, as one step left it; it stands while the loss of the
last tenth is measured, all of it, in float32. Each trial is a process of its own, with the
allocator set alike. Our steps, rows and schedules are made for their target; the others have 12
rows, nanoGPT is tried with both lengths that it publishes, litgpt with the shorter. A trial that
stands in the output is not made again.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import (
    argument_parser,
    earlier,
    environment_of_cache,
    existing,
    facts,
    positive,
    write,
)
from peers import litgpt_model, nanogpt_model
from workloads import WORKLOADS, Workload

from truestep import GPT, Trainer, TrainingConfig, compute_loss
from truestep.compiler import Compilation, uncompiled
from truestep.runtime import keep_freed_memory, multiplies_bfloat16
from truestep.training.probe import logits_of

_WINDOWS_AT_ONCE = 16
_ONE_STEP = 1e-9  # seconds after which a trial is over
# The validation text is read after so many steps, or this share of those made, where a target is
# near, else after five times as many.
_EVERY, _SHARE, _NEAR = 10, 0.02, 0.1
_COLUMNS = ("target", "reached", "seconds", "steps_made", "loss")
# Updates up to the least rate: of nanoGPT's configuration for a CPU, and of the one for a GPU.
_NANOGPT_STEPS = {"nanoGPT": 2000, "nanoGPT, its 5,000 steps": 5000}
_WARM = "truestep compiled, cache warm"
# Ours, and what each compiles.
_OWN: dict[str, Compilation] = {
    "truestep": "off",
    "truestep compiled by layers": "layers",
    "truestep compiled": "on",
    _WARM: "on",
}
_OWN_SHAPE = {"qk_norm": True, "residual_init": "zero"}
_QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
Update = Callable[[int, torch.Tensor], None]


class Clock:
    """Seconds since it was made, less those in which it stood."""

    def __init__(self) -> None:
        self._start, self._stood = time.perf_counter(), 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._stood

    def stand(self, since: float) -> None:
        self._stood += time.perf_counter() - since


def characters(path: Path) -> tuple[torch.Tensor, int]:
    """Return the text as numbers of its characters, and how many there are."""
    text = path.read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[character] for character in text]), len(numbers)


def validation_loss(model: torch.nn.Module, text: torch.Tensor, length: int) -> float:
    """Return the mean loss of all whole windows of a text."""
    windows = text[: (len(text) - 1) // length * length + 1]
    tokens, targets = windows[:-1].view(-1, length), windows[1:].view(-1, length)
    model.eval()
    total = 0.0
    with torch.no_grad(), uncompiled():
        for start in range(0, len(tokens), _WINDOWS_AT_ONCE):
            part = slice(start, start + _WINDOWS_AT_ONCE)
            logits = logits_of(forward(model, tokens[part], targets[part]))
            total += float(compute_loss(logits, targets[part], num_tokens=1))
    model.train()
    return total / targets.numel()


def forward(model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
    """Return all logits; nanoGPT gives them only to those who give targets, and with the loss."""
    if type(model).__module__ == "nanogpt_model":
        return model(tokens, targets)[0]
    return model(tokens)


def truestep_trial(workload: Workload, steps: int, compile_: Compilation, seed: int) -> Any:
    """configs/quickstart.toml on characters, with the rates and the untied head that serve them."""
    torch.manual_seed(seed)
    model = GPT(workload.config().model_copy(update=_OWN_SHAPE))
    trainer = Trainer(model, own_config(steps, compile_, seed), sinks=[])
    return model, lambda _, windows: trainer.training_step(windows)


def own_config(steps: int, compile_: Compilation, seed: int) -> TrainingConfig:
    changes = {
        "learning_rate": 3e-3,
        "muon_momentum": 0.9,
        "embedding_learning_rate_factor": 10,  # pays in a few hundred steps: docs/recipes.md
        "num_steps": steps,
        "warmup_steps": min(20, steps // 10),
        "decay_steps": 3 * steps // 5,
        "compile": compile_,
        "seed": seed,
    }
    return TrainingConfig.load(_QUICKSTART).model_copy(update=changes)


def nanogpt_trial(workload: Workload, path: Path, steps: int, seed: int) -> Any:
    """nanoGPT's model and optimizer by its configuration for characters: float32 on a CPU."""
    torch.manual_seed(seed)
    model = nanogpt_model(workload, path, workload.vocab_size)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def update(step: int, windows: torch.Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, 1e-3, 1e-4, 100, steps)
        _, loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, update


def litgpt_trial(workload: Workload, steps: int, seed: int) -> Any:
    """litgpt's model as its pretrain.py trains it, with nanoGPT's learning rate and warm-up.

    Its own, 4e-4 after 2000 steps, are made for runs a thousand times as long. In float32 where the
    processor has no products of bfloat16.
    """
    import lightning
    from litgpt.utils import chunked_cross_entropy

    raw = litgpt_model(workload, seed)
    native = multiplies_bfloat16(torch.device("cpu"))
    precision: Any = "bf16-mixed" if native else "32-true"
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    compiled: Any = torch.compile(raw)
    model = fabric.setup(compiled)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = fabric.setup_optimizers(plain)

    def update(step: int, windows: torch.Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, 1e-3, 1e-4, 100, steps)
        loss = chunked_cross_entropy(model(windows[:, :-1]), windows[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return raw, update


def cosine(step: int, peak: float, least: float, warmup: int, steps: int) -> float:
    """nanoGPT's schedule."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / (steps - warmup))
    return least + (1 + math.cos(math.pi * progress)) / 2 * (peak - least)


def trial(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train one of them in this process until its last target, its last step or the limit."""
    text, vocab_size = characters(options.data)
    cut = 9 * len(text) // 10
    workload = Workload(4, 4, 128, vocab_size, 256, options.rows)
    if options.variant == "litgpt":  # what others import stands at the top
        import lightning  # noqa: F401
        import litgpt.model
        import litgpt.utils  # noqa: F401
    keep_freed_memory()
    length, clock = workload.context_length, Clock()
    if options.variant in _NANOGPT_STEPS:
        model, update = nanogpt_trial(workload, options.nanogpt, options.steps, options.seed)
    elif options.variant == "litgpt":
        model, update = litgpt_trial(workload, options.steps, options.seed)
    else:
        compile_ = _OWN[options.variant]
        model, update = truestep_trial(workload, options.steps, compile_, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    step, next_look, loss, seconds = 0, 5 * _EVERY, math.inf, 0.0
    left, found = sorted(options.targets, reverse=True), []
    while left and step < options.steps and seconds < options.limit:
        starts = torch.randint(cut - length - 1, (workload.batch_size, 1), generator=generator)
        update(step, text[starts + torch.arange(length + 1)])
        step += 1
        seconds = clock.seconds()
        if step in (next_look, options.steps):
            began = time.perf_counter()
            loss = validation_loss(model, text[cut:], length)
            clock.stand(began)
            while left and loss <= left[0]:
                found.append((left.pop(0), True, seconds, step, loss))
            is_near = left and loss < left[0] + _NEAR
            next_look = step + max(_EVERY, int(_SHARE * step)) * (1 if is_near else 5)
    found += [(target, False, seconds, step, loss) for target in left]
    return [dict(zip(_COLUMNS, row, strict=True)) for row in found]


def in_a_process(options: argparse.Namespace, key: dict[str, Any]) -> list[dict[str, Any]]:
    """Make a trial in a process of its own, with a compiler's cache of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--data", str(options.data)]
    if options.nanogpt is not None:
        command += ["--nanogpt", str(options.nanogpt)]
    for name in ("variant", "steps", "rows", "seed"):
        command += [f"--{name}", str(key[name])]
    command += ["--targets", *map(str, key["targets"])]
    with tempfile.TemporaryDirectory() as cache:
        environment = environment_of_cache(Path(cache)) | {"CUDA_VISIBLE_DEVICES": ""}
        limits = [_ONE_STEP] if key["variant"] == _WARM else []  # fills the cache
        for seconds in (*limits, 60 * options.minutes):
            limited = [*command, "--limit", str(seconds)]
            output = subprocess.check_output(limited, env=environment, text=True)
    found: list[dict[str, Any]] = json.loads(output.splitlines()[-1])
    return [{**key, **row} for row in found]


def wanted(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what makes each trial: ours have a schedule for each target, the others one for all."""
    text = hashlib.sha256(options.data.read_bytes()).hexdigest()
    theirs = {"litgpt": 2000} | _NANOGPT_STEPS
    for seed in options.seeds:
        common = {"seed": seed, "text": text, "minutes": options.minutes}
        for target, steps, rows in zip(
            options.targets, options.own_steps, options.own_rows, strict=True
        ):
            for variant in (name for name in options.variants if name in _OWN):
                config = own_config(steps, _OWN[variant], seed)
                recipe = config.model_dump(mode="json") | _OWN_SHAPE
                own = {"variant": variant, "steps": steps, "rows": rows, "targets": [target]}
                yield own | {"recipe": recipe} | common
        for variant in (name for name in options.variants if name in theirs):
            own = {"variant": variant, "steps": theirs[variant], "rows": 12}
            yield own | {"targets": options.targets} | common


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=existing, required=True, help="a text file")
    parser.add_argument("--nanogpt", type=existing, help="a checkout of nanoGPT")
    every = [*_OWN, *_NANOGPT_STEPS, "litgpt"]
    parser.add_argument("--variants", nargs="+", choices=every, default=every[:-1])
    parser.add_argument("--targets", type=float, nargs="+", default=[1.73, 1.50])
    parser.add_argument("--own-steps", type=positive, nargs="+", default=[340, 2000])
    parser.add_argument("--own-rows", type=positive, nargs="+", default=[6, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=30, help="longest trial")
    hidden = parser.add_argument_group("of a single trial, in its process")
    hidden.add_argument("--variant")
    hidden.add_argument("--steps", type=positive)
    hidden.add_argument("--rows", type=positive)
    hidden.add_argument("--seed", type=int)
    hidden.add_argument("--limit", type=float)
    options = parser.parse_args()
    if options.variant is not None:
        print(json.dumps(trial(options)))
        return
    if not len(options.targets) == len(options.own_steps) == len(options.own_rows):
        parser.error("--targets, --own-steps and --own-rows are of one length: a number for each")
    if options.nanogpt is None and not _NANOGPT_STEPS.keys().isdisjoint(options.variants):
        parser.error("--nanogpt PATH is needed to try nanoGPT; or name others by --variants")
    results = earlier(options.output, "trials")
    for key in wanted(options):
        if any(key.items() <= result.items() for result in results):
            continue
        commit = facts()["commit"]
        for row in in_a_process(options, key):
            place = {name: row[name] for name in ("variant", "seed", "target")}
            results = [result for result in results if not place.items() <= result.items()]
            results.append({**row, "commit": commit})
            print(
                f"{row['variant']:26} seed {row['seed']} to {row['target']}: "
                f"{' ' if row['reached'] else '>'}{row['seconds']:6.1f} s, "
                f"{row['steps_made']} steps, {row['loss']:.4f}",
                flush=True,
            )
        write(options.output, {"trials": results, "workload": vars(WORKLOADS["W3"])})


if __name__ == "__main__":
    main()
