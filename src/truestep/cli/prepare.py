"""`truestep prepare`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def prepare(
    source: str,
    /,
    *,
    out: Annotated[Path, Parameter(alias="-o")],
    validation: str = "auto",
    tokenizer: str = "bytes",
    text_field: str = "text",
    workers: int | Literal["auto"] = "auto",
) -> None:
    """Turn text into a directory of token shards.

    From 64 MiB of files on, one that was killed or failed is taken up by the same command.

    Parameters
    ----------
    source
        A file of text (.txt and the like, .jsonl, .parquet; .gz and .zst of text and .jsonl), a
        directory of them, a pattern as 'data/**/*.jsonl.gz', or a built-in corpus: stdlib,
        torch-src, docstrings; hf:NAME[:CONFIG][:SPLIT] or a directory of save_to_disk, of the
        library datasets. A line of .jsonl and a row of .parquet are a document each.
    out
        The directory to write; it must not exist.
    validation
        A text file or directory to validate on; auto holds out a tenth of the source.
    tokenizer
        bytes, or bpe-N for N byte pairs learnt from the text to train on.
    text_field
        What holds the text in a line of .jsonl, or the column of .parquet.
    workers
        Processes that share the files; auto: one for each core this process may use. What is
        written is the same for any number.

    """
    from truestep.cli.options import say
    from truestep.data.prepare import prepare as prepare_data
    from truestep.data.tokenizer import find_tokenizer
    from truestep.observe.text import count
    from truestep.shell import command

    data = prepare_data(
        source,
        out,
        tokenizer=find_tokenizer(tokenizer),
        validation=validation,
        text_field=text_field,
        workers=workers,
        say=say,
    )
    say(f"{count(len(data.train), 'token')} to train on, {len(data.validation):,} to validate on")
    say(f"written to {out}; train with: {command('train', '--data', out)}")
