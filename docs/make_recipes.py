"""Write docs/recipes.md from the figures in docs/figures: `make docs`."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NANOGPT = ("nanoGPT", "nanoGPT, its 5,000 steps")
FIGURES = Path(__file__).parent / "figures"
Bits = dict[tuple[str, str], dict[int, float]]

HEAD = """# Recipes

How the settings of [configs/quickstart.toml](../configs/quickstart.toml), which `make train` uses, were found, and what they cost. The larger recipes of [configs/](../configs) carry its rates over, those of embeddings halved where the head has its own; they are planned, each with its figures in its first lines, and not yet trained to their end. The library's own defaults are AdamW with 3e-4, 0.1 and (0.9, 0.95).
"""

SEARCH_TEXT = """## The search

`python benchmarks/recipe.py --output docs/figures/recipe.json`: trials of {steps} steps of 3,072 tokens, as many as `make train` had when the search began, on the source of Python's standard library; what counts is the bits per byte of the whole validation text. "start" is configs/quickstart.toml as it was then: 4 layers of width 128 with two heads over 4,096 byte pairs, embeddings tied to the head, a warm-up of 20 steps and a linear decay over the last two fifths; for AdamW the same at a rate of 2e-3, in as many steps, though one with AdamW takes less time. Each other trial changes one thing, and where that changes the time of a step on two cores, it has as many steps as take the same time there. All trials on seed 0 but those of bytes and of other texts were made on one H200 in bfloat16 (torch 2.11, 16 at a time, a minute or two each), and most on two cores, one thread a trial, in float32 ({machine}; AdamW's start on seed 2, bytes, a start for them to be held against, and docstrings in bfloat16 on {other}), on the same text; where there are several figures they are seeds 0, 1, 2.
"""

SAME_TEXT = """
The H200 and two cores, which differ in processor, in the release of torch and, but for one trial, in arithmetic, differ by {median:.3f} in the median of {count} trials, and by {most:.3f} at most.
"""

OTHERS_TEXT = """
The best settings of each on other texts, as they were found on the one above, seed 0, on two cores:

| text | Muon, start | AdamW, decay over a fifth |
|---|---|---|
"""

LESSON = """
The figures in this section that are in no table are those of single runs, made on the way.

**Tied embeddings** are worth 0.22 at the rates of the tied model, and 0.13 where embeddings and head have the rates that are best for them: 1.405 in 1,000 steps, against 1.277 tied (single runs, over the first 512 windows of the validation text). Up to step 400 the two losses are the same. Then the tied model learns to copy what stands in its window, names of this file above all, and from step 600 on it is 0.25 nats a token ahead. That is also why short trials mislead: over 450 steps, the end of every schedule comes before this turn, and 2 layers, or embeddings at ten times the rate, look best; at full length both lose.

**One seed tells little.** When the turn comes decides the result, and it is as much a matter of chance as of settings. The three trials that are best on seed 0, within 0.01 of one another, come on seeds 1 and 2 to 1.300 and 1.281 (the start), 1.345 and 1.276 (embeddings and norms at twice the rate), 1.400 and 1.470 (three layers, which turn at step 950 or not at all). So the start is what `make train` runs: it turns in time on every seed, and comes within 0.02 of the same. Given 1,000 steps in place of 900, `make train` comes to 1.265. A rotary base of 500 is 0.04 nats ahead of the start up to its turn, which then comes later. Differences of less than a tenth in the table are no reason to change a setting until they are seen on other seeds. What the tables do show: in as many steps AdamW is 0.25 or more behind Muon, at the best of three rates, and its best trial of all comes to 1.536; two layers do not turn in time; contexts of 512 turn too late.

**What stands in the way is not the training loss.** A thousand steps are one pass over 3.1 million tokens, and held-out files cost 0.3 nats a token more than new windows of files that were partly seen. What lowers the training loss need not lower the other one. Without tied embeddings, against 1.405 (1,000 steps; the first 512 windows of the validation text): a table of 16,384 hashed pairs of tokens, added to the embeddings, 0.05 nats lower in training and 1.451 held out; dropout of 0.1 1.450; each layer's inputs shifted by one token with a learnt share per feature 1.368. With tied embeddings that shift is 0.11 nats lower in training and 0.012 bits per byte held out (1.287 to 1.275): too little for a layer that no public architecture has.

**Tried and lost, over shorter runs**: pieces of the tokenizer from one space to the next (3.84 bytes a token instead of 3.31), signs together with the line end and indentation after them (3.67 bytes), embeddings that start at a standard deviation of 1 instead of 0.02.
"""

# What stands in place of an ingredient of the start with Muon, by group and name of the trial.
INGREDIENTS = {
    ("adamw", "start"): "AdamW at 2e-3 in place of Muon",
    ("muon", "embeddings apart from the head"): "a head of its own in place of tied embeddings",
    ("muon", "4 heads"): "four heads in place of two",
    ("without", "bytes"): "bytes in place of 4,096 byte pairs",
    ("without", "queries and keys as they are"): "queries and keys that are not normed",
    ("without", "blocks that begin at random"): "blocks that begin at random in place of zero",
    ("without", "a constant rate"): "a constant rate in place of a decay",
}

INGREDIENTS_TEXT = """
What the start with Muon loses in bits per byte without one of its ingredients, on the H200 (bytes, and what they are held against, on the Xeon), in as many steps or, with four heads and with bytes, in the 840 and 1,240 that take as long on two cores; what is tied to chance, as the text below says, is in these figures too:

| with | loss |
|---|---|
"""

TRANSFER_TEXT = """## Learning rates that carry over

`python benchmarks/transfer.py --output docs/figures/transfer.json`: the recipe on bytes, {steps} steps, with both learning rates multiplied alike ({machine}). Bits per byte (seed: {seeds}); in bold the least mean:
"""

TRANSFER_FOUND = """
The best of the smallest model is x {smallest:g}, that of the largest x {largest:g}: whoever takes the first for the second loses {loss:.3f}.
"""

PLAN_TEXT = """## What a plan predicts, and what the run shows

`python benchmarks/plan.py --turns N --pairs N --output docs/figures/plan.json` ({machine}). The time of a step, compiled whole: a plan and a run stand side by side, and of several turns each is a measurement of the plan, 5 s of steps, between two stretches of 6 s of the run, whose steps are those of its log; medians. Memory: the peak that the system says of a process, a plan's as `truestep plan` says it and a run's that validates and saves five times on the way, each with an empty compile cache; medians of one pair or three, least to most. A ratio is the median of those of the turns or pairs, least to most, not that of the two medians beside it: this machine is shared, its speed changes between turns, and how the heap is cut up differs from process to process. Two were measured again in fifteen turns: Muon on byte pairs, which came to 1.10 (1.02 to 1.22) in seven, and W2, whose ratio was 1.02 (0.85 to 1.19) there, but its two medians 1.11 apart.

| | turns, pairs | ms a step, predicted | seen | ratio | MiB, predicted | seen | ratio |
|---|---|---|---|---|---|---|---|
"""

LOSS_TEXT = """## Time to a loss

`python benchmarks/time_to_loss.py --data tinyshakespeare.txt --nanogpt PATH`: seconds from when everything is imported, building the model and compilation included, with an empty cache or, where it is said to be warm, with what one step left, until the loss of tiny Shakespeare's last tenth, all of it, is at most the target; the clock stands while that is measured. W3's layers, 256 characters of context; 12 rows, ours 6. nanoGPT's model and optimizer are its own, in float32 as on any CPU; schedule and step are as its train.py has them, without dropout. Ours is in bfloat16 where the processor multiplies it, as this Xeon does and this EPYC does not. Trials were made one after another with nothing beside them. On the Xeon nanoGPT had its longer schedule alone. ">": not reached, a lower bound. Median of the seeds, least to most; the factor is over the faster of nanoGPT's two schedules that reached it, or the longer where neither did.
"""
LOSS_TABLE = """
| {machine} | to | seeds | seconds | steps | factor |
|---|---|---|---|---|---|
"""


def search() -> str:
    """Return the tables of the trials, the best of each optimizer first."""
    record, later, fast = load("recipe"), load("recipe-xeon"), load("recipe-h200")
    every = record["trials"] + later["trials"]
    trials = [t for t in every if t["data"] == "stdlib"]
    here, there = _by_name(trials), _by_name(fast["trials"])
    on_xeon = _by_name([t for t in later["trials"] if t["data"] == "stdlib"])
    steps = next(t["settings"]["training"]["num_steps"] for t in trials if t["name"] == "start")
    text = SEARCH_TEXT.format(steps=steps, machine=record["machine"], other=later["machine"])
    for group, title in (("muon", "Muon"), ("adamw", "AdamW")):
        text += f"\n| {title} | H200 | two cores |\n|---|---|---|\n"
        own = [name for of, name in there if of == group]
        for key in sorted(((group, name) for name in own), key=lambda key: there[key][0]):
            cells = (
                ", ".join(f"{bits:.3f}" for _, bits in sorted(found.get(key, {}).items()))
                for found in (there, here)
            )
            text += f"| {key[1]} | {' | '.join(cells)} |\n"
    differences = [
        abs(bits - there[key][seed])
        for key, found in here.items()
        for seed, bits in found.items()
        if seed in there.get(key, {})
    ]
    text += SAME_TEXT.format(
        median=statistics.median(differences), most=max(differences), count=len(differences)
    )
    return f"\n{text}{ingredients(there, on_xeon)}{other_texts(every)}{LESSON}"


def _by_name(trials: list[Any]) -> Bits:
    """Return bits per byte by group and name, and then by seed."""
    found: Bits = {}
    for trial in trials:
        by_seed = found.setdefault((trial["group"], trial["name"]), {})
        by_seed.setdefault(trial["seed"], trial["bits_per_byte"])  # the first machine's counts
    return found


def ingredients(*machines: Bits) -> str:
    """Return the table of what the start loses without each of its ingredients."""
    found = {}
    for bits in reversed(machines):  # the first one's figures count
        start = bits["muon", "start"][0]
        found |= {
            words: bits[key][0] - start
            for key, words in INGREDIENTS.items()
            if 0 in bits.get(key, {})
        }
    rows = "".join(
        f"| {words} | {loss:+.3f} |\n"
        for words, loss in sorted(found.items(), key=lambda item: -item[1])
    )
    return f"{INGREDIENTS_TEXT}{rows}"


def other_texts(trials: list[Any]) -> str:
    """Return the table of the winners on other texts; nothing where none was tried."""
    found: dict[str, dict[str, str]] = {}
    for trial in trials:
        winner = {"muon": "start", "adamw": "decay over a fifth"}.get(trial["group"])
        if trial["data"] != "stdlib" and (trial["name"], trial["seed"]) == (winner, 0):
            cells = found.setdefault(trial["data"], {})
            cells[trial["group"]] = f"{trial['bits_per_byte']:.3f}"
    rows = "".join(
        f"| {data} | {cells.get('muon', '')} | {cells.get('adamw', '')} |\n"
        for data, cells in found.items()
    )
    return f"{OTHERS_TEXT}{rows}" if rows else ""


def transfer() -> str:
    """Return the table of losses by width and factor."""
    record = load("transfer")
    trials = sorted(record["trials"], key=lambda t: t["seed"])
    factors = sorted({t["factor"] for t in trials})
    text = TRANSFER_TEXT.format(
        steps=trials[0]["settings"]["training"]["num_steps"],
        machine=record["machine"],
        seeds=", ".join(str(seed) for seed in sorted({t["seed"] for t in trials})),
    )
    text = f"\n{text}\n| width | {' | '.join(f'x {factor:g}' for factor in factors)} |\n"
    text += f"|---|{'---|' * len(factors)}\n"
    best, means = [], {}
    for width in sorted({t["width"] for t in trials}):
        here: dict[float, list[float]] = {factor: [] for factor in factors}
        for trial in (t for t in trials if t["width"] == width):
            here[trial["factor"]].append(trial["bits_per_byte"])
        means = {factor: statistics.mean(bits) for factor, bits in here.items()}
        best.append(min(means, key=means.__getitem__))
        cells = {factor: ", ".join(f"{b:.3f}" for b in bits) for factor, bits in here.items()}
        cells[best[-1]] = f"**{cells[best[-1]]}**"
        text += f"| {width} | {' | '.join(cells.values())} |\n"
    loss = means[best[0]] - means[best[-1]]  # of the last width, the largest
    return text + TRANSFER_FOUND.format(smallest=best[0], largest=best[-1], loss=loss)


def plan() -> str:
    """Return the table of what was predicted and seen."""
    record = load("plan")
    rows = ""
    for config in record["configs"]:
        seconds, held = config["seconds"], config["bytes"]
        before, after = (1e3 * statistics.median(seconds[of]) for of in ("predicted", "seen"))
        cells = [f"{before:,.0f}", f"{after:,.0f}", _ratio(seconds)]
        cells += [_spread([size / 2**20 for size in held[of]]) for of in ("predicted", "seen")]
        cells.append(_ratio(held))
        name = config["name"]
        if config["gpu"]:
            there = config["computed"]
            name += f" ({1e3 * there['seconds']:,.0f} ms, {2**-20 * there['bytes']:,.0f} MiB by "
            name += f"the data sheet of {config['gpu']})"
        rows += f"| {name} | {config['turns']}, {config['pairs']} | {' | '.join(cells)} |\n"
    return f"\n{PLAN_TEXT.format(machine=record['machine'])}{rows}"


def _ratio(both: dict[str, list[float]]) -> str:
    """Return predicted over seen: the median of those measured together, and their spread."""
    return _spread(
        [said / seen for said, seen in zip(both["predicted"], both["seen"], strict=True)], ".2f"
    )


def _spread(values: list[float], form: str = ",.0f") -> str:
    """Return the median, with the least and most of several."""
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.median(values):{form}}{spread}"


def time_to_loss() -> str:
    """Return a table for each machine: seconds to each target."""
    tables = ""
    for path in sorted(FIGURES.glob("time-to-loss*.json")):
        record = load(path.stem)
        tables += LOSS_TABLE.format(machine=record["machine"]) + "".join(rows_of(record["trials"]))
    return f"\n{LOSS_TEXT}{tables}"


def rows_of(trials: list[Any]) -> Iterator[str]:
    """Yield a row for each target and what reached it, or did not."""
    for target in dict.fromkeys(t["target"] for t in trials):
        here = [t for t in trials if t["target"] == target]
        theirs = [base for base in (_trials(here, v) for v in NANOGPT) if base]
        reached = [base for base in theirs if all(t["reached"] for t in base)]
        fastest = min(reached, key=_seconds, default=[])
        base = fastest or max(theirs, key=_seconds, default=[])
        for variant in dict.fromkeys(t["variant"] for t in here):
            own = _trials(here, variant)
            seconds = sorted(t["seconds"] for t in own)
            sign, factor = "> ", ""
            if all(t["reached"] for t in own):
                sign, bound = "", "" if reached else "> "
                factor = f"{bound}{_seconds(base) / _seconds(own):.1f}" if base else ""
            steps = statistics.median(t["steps_made"] for t in own)
            yield (
                f"| {variant} | {target:g} | {len(own)} | {sign}{_seconds(own):,.0f} ({seconds[0]:,.0f} to "
                f"{seconds[-1]:,.0f}) | {steps:,.0f} | {factor} |\n"
            )


def _trials(trials: list[Any], variant: str) -> list[Any]:
    return [trial for trial in trials if trial["variant"] == variant]


def _seconds(trials: list[Any]) -> float:
    return statistics.median(trial["seconds"] for trial in trials)


def load(name: str) -> Any:
    """Return the figures of one benchmark."""
    return json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))


def make_recipes() -> str:
    """Return the page, with a section for each benchmark that was run."""
    sections = {
        "recipe": search,
        "transfer": transfer,
        "time-to-loss": time_to_loss,
        "plan": plan,
    }
    found = (make() for name, make in sections.items() if (FIGURES / f"{name}.json").exists())
    return HEAD + "".join(found)


if __name__ == "__main__":
    (FIGURES.parent / "recipes.md").write_text(make_recipes(), encoding="utf-8")
