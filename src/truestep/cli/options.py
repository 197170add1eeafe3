"""The settings as command-line options, and errors about them."""

import functools
import operator
import sys
import types
from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from cyclopts import CycloptsError, Group, MissingArgumentError, Parameter, UnusedCliTokensError
from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from truestep.config import RunConfig
from truestep.settings import Config, ConfigError, Problem, explain, section_of

_TITLES = {
    "training": "How the model is trained",
    "model": "The model",
    "data": "The data",
    "run": "The run",
}


def _options_of(config: type[Config]) -> type[Config]:
    """Return a model of the same fields without rules between several of them.

    A file or the environment may still supply the other half; `resolve` checks the whole.
    """
    fields: dict[str, Any] = {}
    for name, field in config.model_fields.items():
        section = section_of(field)
        if section is None:
            fields[name] = _option_of(field)
        else:
            group = Group(_TITLES[name], sort_key=list(_TITLES).index(name))
            options = _options_of(section)
            fields[name] = (Annotated[options, Parameter(group=group)], options())
    return create_model(config.__name__, __base__=Config, **fields)


def _option_of(field: FieldInfo) -> tuple[Any, FieldInfo]:
    """Return type and field of an option: one that may be a list is given once for each value.

    Or once for several numbers: what follows a text may be another argument.
    """
    annotation: Any = field.annotation
    lists = [a for a in get_args(annotation) if get_origin(a) is tuple and get_args(a)[-1] is ...]
    if not lists:
        return annotation, field
    item = get_args(lists[0])[0]
    others = [other for other in get_args(annotation) if other is not lists[0]]
    each = functools.reduce(operator.or_, others, item)
    parameter = Parameter(
        consume_multiple=item is not str,
        negative_iterable=(),
        show_default=operator.itemgetter(0),
    )
    field = copy(field)
    field.default = (field.default,)
    return Annotated[types.GenericAlias(tuple, (each, ...)), parameter], field


if TYPE_CHECKING:
    RunOptions = RunConfig  # the same fields; a type checker cannot follow how they are made
else:
    RunOptions = _options_of(RunConfig)


def say(text: str) -> None:
    """Print text that any encoding can take and no terminal obeys, at once."""
    from truestep.observe.sinks import print_line  # imports numpy, which `--help` does without
    from truestep.observe.text import printable

    print_line(sys.stdout, printable(text))


def given(options: Config, data: tuple[str, ...]) -> dict[str, Any]:
    """Return what was given on the command line, nested; `data` is short for data.source."""
    explicit = options.model_dump(exclude_unset=True)
    if data:
        if (other := explicit.get("data", {}).get("source", data)) != data:
            one, two = (" ".join(each) for each in (data, other))
            text = f"--data={one} and --data.source={two} name two texts; give one"
            raise ConfigError([Problem((), text)])
        explicit.setdefault("data", {})["source"] = data
    return explicit


def explain_usage(error: CycloptsError) -> str:
    """Return one line for each thing wrong with the command line."""
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        problems = explain(cause, RunConfig, {})
        return "\n".join(f"command line: {problem.text}" for problem in problems)
    if isinstance(cause, ConfigError):
        return "\n".join(f"command line: {problem.text}" for problem in cause.problems)
    if isinstance(error, MissingArgumentError) and error.argument and error.tokens_so_far:
        return (
            f"{error.argument.name} takes {error.argument.token_count()[0]} values, and "
            f"{len(error.tokens_so_far)} was given: {' '.join(error.tokens_so_far)}"
        )
    unused = error.unused_tokens if isinstance(error, UnusedCliTokensError) else None
    if unused and unused[0].lower() in {"true", "false"}:
        return (
            f"{unused[0]} is not understood: true and false are written --section.setting and "
            "--section.no-setting"
        )
    return " ".join(str(error).split())
