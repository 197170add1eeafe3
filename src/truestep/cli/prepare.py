"""`truestep prepare`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def prepare(
    source: str,
    /,
    *,
    out: Annotated[Path, Parameter(alias="-o")],
    validation: str = "auto",
    tokenizer: str = "bytes",
) -> None:
    """Turn text into a directory of token shards.

    Parameters
    ----------
    source
        A text file, a directory of text, or a built-in corpus: stdlib, torch-src, docstrings.
    out
        The directory to write; it must not exist.
    validation
        A text file or directory to validate on; auto holds out a tenth of the source.
    tokenizer
        bytes, or bpe-N for N byte pairs learnt from the text to train on.

    """
    from truestep.cli.options import say
    from truestep.data.prepare import prepare as prepare_data
    from truestep.data.tokenizer import find_tokenizer
    from truestep.observe.text import count
    from truestep.shell import command

    data = prepare_data(
        source, out, tokenizer=find_tokenizer(tokenizer), validation=validation, say=say
    )
    say(f"{count(len(data.train), 'token')} to train on, {len(data.validation):,} to validate on")
    say(f"written to {out}; train with: {command('train', '--data', out)}")
