"""What the pages have in common: one HTML file that needs nothing else and runs no script."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from truestep.observe.text import printable, printable_line
from truestep.storage import LOCAL, replace_file

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1b2430; --faint: #626d7b; --line: #e3e6eb;
  --blue: #2f6fde; --orange: #c9541e; --red: #c62f3b; --mark: #dfe9fc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181e; --card: #1c222b; --ink: #e4e8ee; --faint: #97a2b0; --line: #2c343f;
    --blue: #6ea2ff; --orange: #f08a54; --red: #ff7680; --mark: #24385e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 32px 20px 64px; max-width: 1040px;
  background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 44px 0 14px; }
h3 { font-size: 14px; margin: 0 0 6px; }
.subtitle, .unit, .note { color: var(--faint); }
.subtitle { margin: 4px 0 24px; overflow-wrap: anywhere; }
dl.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 10px; margin: 0;
}
dl.facts div { background: var(--card); border-radius: 8px; padding: 10px 14px; }
dl.facts dt { color: var(--faint); font-size: 13px; }
dl.facts dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
pre {
  margin: 0; padding: 12px 14px; overflow-x: auto; max-height: 420px; tab-size: 4;
  background: var(--card); border-radius: 8px;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
table { border-collapse: collapse; width: 100%; font-size: 14px; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th, td {
  text-align: left; font-weight: normal; vertical-align: top; overflow-wrap: anywhere;
  padding: 4px 12px 4px 0; border-top: 1px solid var(--line);
}
th { color: var(--faint); }
"""


def write_page(path: Path, title: str, style: str, sections: Iterable[str]) -> Path:
    """Write a page of HTML sections and return its path; it appears whole or not at all.

    `title` is HTML; `style` is added to what every page has. Empty sections are left out.
    """
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # No script, no address: whatever a hostile name might have smuggled in stays inert.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} · truestep</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )
    replace_file(LOCAL, path, page.encode())
    return path


def facts_list(facts: Iterable[tuple[str, str]]) -> str:
    """Return the numbers at the head of a page, each with its name, both HTML."""
    cells = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{"".join(cells)}</dl>'


def line(text: str) -> str:
    """Return any text as HTML on one line that nothing obeys."""
    return escape(printable_line(text))


def block(text: str) -> str:
    """Return any text as HTML that nothing obeys; newlines and tabs stay."""
    return escape(printable(text))
