"""Write docs/reference.md and docs/config.schema.json from the settings themselves.

python docs/make_reference.py
"""

import json
from pathlib import Path

from truestep import RunConfig
from truestep.settings import settings

HEAD = """# Settings

Every setting of a run, with its type, its default and its meaning. This page is made from the code
by `make docs`; the same text stands in `truestep train --help` and in the docstrings of
`TrainingConfig`, `GPTConfig`, `DataConfig` and `RunSettings`.

A setting stands in a section of a TOML or JSON file, in the environment as
`TRUESTEP_SECTION__NAME`, or on the command line as `--section.name`. The command line wins over the
environment, the environment over the file, and the file over the default. An unknown name is an
error everywhere. Settings marked *kept* change what is trained: a resumed run keeps them, unless
`--override section.name` allows the change.
"""


def make_reference() -> str:
    """Return the reference page."""
    lines = [HEAD]
    section = ""
    for setting in settings(RunConfig):
        if setting.name.split(".")[0] != section:
            section = setting.name.split(".")[0]
            documentation = RunConfig.model_fields[section].annotation.__doc__ or ""
            lines.append(f"\n## [{section}]\n\n{documentation.splitlines()[0]}\n")
            lines.append("| setting | type | default | | meaning |\n|---|---|---|---|---|")
        name = setting.name.split(".")[1]
        kept = "*kept*" if setting.kept_on_resume else ""
        row = [f"`{name}`", setting.type, f"`{setting.default}`", kept, setting.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def make_schema() -> str:
    """Return the JSON Schema of a settings file."""
    return json.dumps(RunConfig.model_json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "reference.md").write_text(make_reference(), encoding="utf-8")
    (here / "config.schema.json").write_text(make_schema(), encoding="utf-8")
