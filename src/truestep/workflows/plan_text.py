"""A plan as a person reads it."""

from collections.abc import Iterator

from truestep.gpus import ASSUMED_UTILIZATION
from truestep.observe.text import count, format_bytes, format_duration
from truestep.workflows.plan import COMPILED, Plan

_SHORT_STEP = 0.03  # seconds: a step of W1, computed as 0.7 ms, took 13 ms on an H200
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def lines_of(plan: Plan, price_per_hour: float | None = None) -> Iterator[str]:
    """Yield the plan as a person reads it."""
    config, found = plan.config, plan.estimate
    known = COMPILED.get(config.training.compile)  # not on a GPU that is elsewhere
    compiled = f", {known}" if known else ""
    yield f"machine     {plan.machine}, {config.training.precision}{compiled}"
    yield f"parameters  {found.num_parameters:,}"
    tokens = f"{found.tokens_per_step:,} tokens a step"
    if found.flops_per_token is None:
        yield f"arithmetic  unknown for this model; {tokens}"
    else:
        per_step = found.flops_per_token * found.tokens_per_step
        yield (
            f"arithmetic  {_short(found.flops_per_token)}FLOP a token, "
            f"{_short(per_step)}FLOP a step; {tokens}"
        )
    yield from _memory(plan)
    rate = f"of {_short(found.peak_flops_per_second)}FLOP/s"
    utilization = "" if found.utilization is None else f", MFU {found.utilization:.0%} {rate}"
    yield (
        f"speed       {_seconds(found.step)} a step, {found.tokens_per_second:,.0f} tokens/s"
        f"{utilization}"
    )
    if plan.computed:
        yield f"            computed at an assumed MFU of {ASSUMED_UTILIZATION:.0%}, not measured"
        if found.step < _SHORT_STEP:
            yield "            a lower bound: a GPU waits for the host in so short a step"
    training = config.training
    if training.schedule != "constant":
        decay = f", decay {training.decay_steps}" if training.schedule == "wsd" else ""
        yield f"schedule    {training.schedule}, warm-up {training.warmup_steps}{decay} steps"
    steps = training.num_steps
    times = steps * found.tokens_per_step / plan.train_tokens
    yield (
        f"text        {plan.train_tokens:,} tokens of {config.data.tokenizer}, "
        f"{config.model.vocab_size:,} ids; read {times:,.2f} times"
    )
    for name, (share, available) in plan.shares.items():
        times = steps * found.tokens_per_step * share / available
        yield f"            {share:.1%} of {name}, {available:,} tokens; read {times:,.2f} times"
    seconds = plan.seconds(steps)
    if plan.computed:
        yield (
            f"time        {_duration(seconds)} for {count(steps, 'step')} alone: without "
            "start, compilation and validation"
        )
    else:
        yield _time(plan, seconds)
    if price_per_hour is not None:
        cost = (seconds + plan.last_validation) / 3600 * price_per_hour
        yield f"cost        {cost:,.2f} at {price_per_hour:g} an hour"


def _memory(plan: Plan) -> Iterator[str]:
    """Yield the lines that say what a step takes, and what fits."""
    found = plan.estimate
    if (memory := found.memory) is not None:
        yield (
            f"memory      weights {format_bytes(memory.weights)}, gradients "
            f"{format_bytes(memory.gradients)}, moments {format_bytes(memory.moments)}, "
            f"activations {format_bytes(memory.activations)} (logits {format_bytes(memory.logits)})"
        )
    if plan.peak_bytes is not None:
        what = "together"
        if not plan.computed:
            what = "at the peak of the whole process, with what allocators keep"
        yield f"            {format_bytes(plan.peak_bytes)} {what}"
    if found.largest_micro_batch is not None:
        most = count(found.largest_micro_batch, "window")
        fit = f"of up to {most} fit" if found.largest_micro_batch else "do not fit"
        yield f"            micro-batches {fit}; each has {found.micro_batch_size:,}"


def _time(plan: Plan, seconds: float) -> str:
    """Return the line that takes a run's time apart."""
    steps, found = plan.config.training.num_steps, plan.estimate
    validations = (steps - 1) // plan.config.run.evaluate_every
    on_the_way = f", {_seconds(plan.validation)} each of {count(validations, 'validation')}"
    return (
        f"time        {_duration(seconds)} for {count(steps, 'step')}: {_seconds(plan.start)} to "
        f"start, {_seconds(found.first_step)} the first step{on_the_way if validations else ''}; "
        f"then {_duration(plan.last_validation)} for a last validation over all of the text"
    )


def _duration(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 0.9995 else _seconds(seconds)


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 0.9995 else f"{value:,.2f} s"


def _short(value: float) -> str:
    """Return a number with three digits and a prefix: 18.1 G."""
    for size, prefix in _UNITS:
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
