"""`truestep sample`."""

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def sample(
    run: str = "auto",
    /,
    *,
    prompt: Annotated[str, Parameter(alias="-p")] = "",
    tokens: Annotated[int, Parameter(validator=Number(gt=0))] = 300,
    temperature: Annotated[float, Parameter(validator=Number(gte=0))] = 0.8,
    top_p: Annotated[float, Parameter(validator=Number(gt=0, lte=1))] = 0.95,
    seed: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    checkpoint: str = "newest",
    device: str = "auto",
) -> None:
    """Let a trained model write.

    Parameters
    ----------
    run
        A run's directory; auto is the newest below runs/.
    prompt
        Text to continue; without it the model begins a document.
    tokens
        How many tokens to write at most.
    temperature
        0 always takes the likeliest token; 1 follows the model's probabilities.
    top_p
        Choose among the likeliest tokens that together have this probability.
    seed
        The same seed writes the same text.
    checkpoint
        newest, best (by validation loss) or a step.
    device
        cpu, cuda, cuda:N or mps; auto is an accelerator if there is one.

    """
    import os
    import sys

    from truestep.cli.options import say
    from truestep.config import resolve
    from truestep.observe.text import printable
    from truestep.workflows.run import find_run
    from truestep.workflows.trained import load_trained, write_text

    directory = find_run(run, resolve({}, os.environ).run)
    trained = load_trained(directory, lambda text: print(text, file=sys.stderr), device, checkpoint)
    written = write_text(
        trained.model,
        trained.tokenizer,
        prompt,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    say(printable(prompt + written))
