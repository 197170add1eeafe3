"""Settings as files and the environment give them: nested, and not yet validated."""

import json
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truestep.settings import Config, ConfigError, Problem, nearest, settings

ENVIRONMENT_PREFIX = "TRUESTEP_"
FILE_LIMIT_BYTES = 2**20  # a settings file is a page, not a corpus


def read_settings_file(path: Path) -> dict[str, Any]:
    """Return the mapping in a TOML or JSON file.

    Errors: ConfigError naming the file, and the place in it.
    """
    try:
        if path.suffix not in {".toml", ".json"} and not path.is_dir():
            raise _file_error(path, "is neither .toml nor .json; rename it or convert it")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait, a device never end
            raise _file_error(path, "is not a file; give a file of settings")
        if status.st_size > FILE_LIMIT_BYTES:
            raise _file_error(path, f"is larger than {FILE_LIMIT_BYTES} bytes: not a config file")
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise _file_error(path, "does not exist; check the path") from None
    except OSError as error:
        raise _file_error(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _file_error(path, "is not in UTF-8; save it so") from None
    except (ValueError, RecursionError) as error:
        raise _file_error(path, f"is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(values, dict):
        remedy = "write key = value lines" if path.suffix == ".toml" else 'write {"section": {}}'
        raise _file_error(path, f"holds no table of settings; {remedy}")
    return values


def read_environment(config: type[Config], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings in `TRUESTEP_SECTION__KEY` variables; values are read as TOML does.

    Errors: ConfigError for a TRUESTEP_ variable that names no setting, with the nearest one.
    """
    known = {_variable(setting.name): setting for setting in settings(config)}
    values: dict[str, Any] = {}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        if variable not in known:
            name = variable.removeprefix(ENVIRONMENT_PREFIX)
            plain = [full.removeprefix(ENVIRONMENT_PREFIX) for full in known]
            ending = [full for full in plain if full.split("__")[-1] == name]
            hint = nearest(name, plain, ending, ENVIRONMENT_PREFIX)
            problem = f"environment variable {variable} names no setting{hint}"
            raise ConfigError([Problem((), problem)])
        table = values
        *sections, key = known[variable].name.split(".")
        for section in sections:
            table = table.setdefault(section, {})
        text = environ[variable]
        is_text = known[variable].type.startswith("str") and not text.startswith("[")
        table[key] = text if is_text else _parse(text)
    return values


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper().replace(".", "__")


def _parse(text: str) -> Any:
    """Read a number, boolean or list as TOML would; anything else is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _file_error(path: Path, text: str) -> ConfigError:
    return ConfigError([Problem((), f"config file {path} {text}")])
