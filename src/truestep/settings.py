"""How settings are declared, validated and explained.

The settings themselves stand in `config.py`; this file knows none of them by name.
"""

import difflib
import json
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo


def trajectory(default: Any, **constraints: Any) -> Any:
    """Declare a setting that changes the trained bits; a resumed run must keep it."""
    return Field(default, json_schema_extra={"on_resume": "kept"}, **constraints)


def cosmetic(default: Any, **constraints: Any) -> Any:
    """Declare a setting that may change at any time without changing the trained bits."""
    return Field(default, json_schema_extra={"on_resume": "free"}, **constraints)


class Problem(NamedTuple):
    """One thing wrong with one setting; `path` leads to it, `text` is the whole sentence."""

    path: tuple[str, ...]
    text: str


class ConfigError(ValueError):
    """Settings that cannot be used: one line each, with field, value, rule and remedy."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(problem.text for problem in problems))


class Config(BaseModel):
    """Settings: immutable, no unknown key, and errors of one line."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_no_number(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"{name}={shown(value)} must be less than 2**63")
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(
                    f"{name}={shown(value)} is true or false, but must be "
                    f"{_type_text(field.annotation)}; the default is {shown(field.default)}"
                )
        return values

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), values)) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Append every setting with its type, default and meaning to the class's docstring."""
        super().__pydantic_init_subclass__(**kwargs)
        lines = [
            f"    {setting.name}: {setting.type} = {setting.default}\n        {setting.meaning}"
            for setting in settings(cls)
        ]
        cls.__doc__ = f"{cls.__doc__}\n\nSettings:\n" + "\n".join(lines)


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Setting:
    """One setting as the documentation shows it."""

    name: str  # with its section: training.learning_rate
    type: str
    default: str
    meaning: str
    kept_on_resume: bool


def settings(config: type[BaseModel]) -> Iterator[Setting]:
    """Yield every setting of a config class, sections flattened, in the order of the source."""
    for name, field in config.model_fields.items():
        if section := section_of(field):
            for inner in settings(section):
                yield Setting(
                    f"{name}.{inner.name}",
                    inner.type,
                    inner.default,
                    inner.meaning,
                    inner.kept_on_resume,
                )
            continue
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or "on_resume" not in extra:
            raise TypeError(f"{config.__name__}.{name} is neither trajectory(…) nor cosmetic(…)")
        yield Setting(
            name,
            _type_text(field.annotation),
            json.dumps(field.default),
            " ".join((field.description or "").split()),
            extra["on_resume"] == "kept",
        )


def validate(config: type[C], sources: Mapping[str, Mapping[str, Any]]) -> C:
    """Merge `sources` (a later one wins, key by key) and return the validated settings.

    `sources` maps the name of each source, as an error should say it, to its nested values.
    Errors: ConfigError naming source, field, value, rule and remedy.
    """
    merged: dict[str, Any] = {}
    origin: dict[tuple[str, ...], str] = {}
    for source, values in sources.items():
        for path, value in _leaves(source, values, config):
            table = merged
            for key in path[:-1]:
                table = table.setdefault(key, {})
            table[path[-1]] = value
            origin[path] = source
    try:
        return config(**merged)
    except ConfigError as error:
        problems = []
        for path, text in error.problems:
            # A rule between several settings names them all: the last source may be the wrong one.
            named = [
                source
                for other, source in origin.items()
                if path in origin
                and (other == path or (other[:-1] == path[:-1] and f"{other[-1]}=" in text))
            ]
            last = max(named, key=list(sources).index, default=None)
            problems.append(Problem(path, text if last is None else f"{last}: {text}"))
        raise ConfigError(problems) from None


def without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings without those that are "auto"."""
    return {
        key: without_auto(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != "auto"
    }


def section_of(field: FieldInfo) -> type[Config] | None:
    """Return the config class of a field that is a section of its own."""
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return None


def _leaves(
    source: str, values: Mapping[str, Any], config: type[BaseModel], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, value) of every setting, descending into sections only."""
    for key, value in values.items():
        field = config.model_fields.get(key)
        if field is None or (section := section_of(field)) is None:
            yield (*prefix, key), value
        elif isinstance(value, Mapping):
            yield from _leaves(source, value, section, (*prefix, key))
        else:
            text = f"{source}: {key}={value!r} must be a table of settings: write [{key}]"
            raise ConfigError([Problem((*prefix, key), text)])


def explain(
    error: ValidationError, config: type[BaseModel], values: Mapping[str, Any]
) -> list[Problem]:
    """Turn pydantic's report into one sentence for each field."""
    rules: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        name = str(detail["loc"][0]) if detail["loc"] else ""
        if isinstance(cause, ConfigError):  # a section has already explained itself
            problems += [
                Problem((name, *path), f"{name}.{text}" if name and path else text)
                for path, text in cause.problems
            ]
        elif detail["type"] == "extra_forbidden":
            hint = nearest(name, config.model_fields)
            problems.append(Problem((name,), f"{shown(name)} is not a setting{hint}"))
        elif cause is not None:  # a rule of ours, a whole sentence, which begins with a field
            field = str(cause).partition("=")[0]
            problems.append(Problem((field,) * (field in config.model_fields), str(cause)))
        else:
            rule = detail["msg"].removeprefix("Input should be ")
            if detail["type"] in {"missing", "too_long"}:  # of numbers that belong together
                rule = f"{len(get_args(config.model_fields[name].annotation))} numbers"
            rules.setdefault(name, []).append(rule[:1].lower() + rule[1:])
    for name, alternatives in rules.items():
        text = (
            f"{name}={shown(values.get(name))} must be {' or '.join(dict.fromkeys(alternatives))}"
        )
        default = shown(config.model_fields[name].default)
        problems.append(Problem((name,), f"{text}; the default is {default}"))
    return problems


def shown(value: Any) -> str:
    """Return a value as a person would type it, cut to one line."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    text = text.encode("unicode_escape").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(
    name: str, known: Iterable[str], preferred: Sequence[str] = (), prefix: str = ""
) -> str:
    """Return the hint that ends an error about an unknown name; one that is `preferred` is taken.

    All that is known, and the name, stand after the same `prefix`.
    """
    matches = preferred or difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{matches[0]}?" if matches else "; see `truestep train --help`"


def _type_text(annotation: Any) -> str:
    """Return a type as the documentation shows it: `int`, `float or "off"`, `list of str`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is ...:
        return f"list of {_type_text(arguments[0])}"
    if origin is tuple:
        return ", ".join(_type_text(argument) for argument in arguments)
    return str(annotation.__name__)
