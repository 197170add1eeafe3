"""The documents say what the code does: quoted code is the code, and examples run."""

import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from truestep import Trainer

ROOT = Path(__file__).parent.parent


def code_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_step_in_the_readme_is_the_step_in_the_source():
    source = textwrap.dedent(inspect.getsource(Trainer._step))
    assert source in code_blocks("README.md")


def test_the_python_example_in_the_readme_runs():
    example = next(block for block in code_blocks("README.md") if "from truestep" in block)
    assert len(example.strip().splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("20 ")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_each_example_is_short_and_learns(path):
    assert len(path.read_text().splitlines()) <= 60
    result = load(path).main()
    if isinstance(result, float):
        assert result < 2.0
    else:
        assert "stopped" in result[-1]


def test_the_reference_page_and_the_schema_are_made_from_the_code():
    maker = load(ROOT / "docs" / "make_reference.py")
    assert (ROOT / "docs" / "reference.md").read_text() == maker.make_reference()
    assert (ROOT / "docs" / "config.schema.json").read_text() == maker.make_schema()


def test_the_page_on_reliability_is_made_from_the_tests_and_the_figures():
    maker = load(ROOT / "docs" / "make_reliability.py")
    assert (ROOT / "docs" / "reliability.md").read_text() == maker.make_reliability()


def test_the_page_on_performance_is_made_from_the_figures():
    maker = load(ROOT / "docs" / "make_performance.py")
    assert (ROOT / "docs" / "performance.md").read_text() == maker.make_performance()
    assert maker.readme_rows() in (ROOT / "README.md").read_text()


def test_the_page_of_recipes_is_made_from_the_figures():
    maker = load(ROOT / "docs" / "make_recipes.py")
    assert (ROOT / "docs" / "recipes.md").read_text() == maker.make_recipes()


def test_the_page_on_scaling_is_made_from_its_model():
    maker = load(ROOT / "docs" / "make_scaling.py")
    assert (ROOT / "docs" / "scaling.md").read_text() == maker.make_scaling()


@pytest.mark.parametrize(("name", "gpus"), [("124M", 8), ("1.3B", 64), ("1.3B", 256), ("7B", 1024)])
@pytest.mark.parametrize("links", [1, 8])
def test_the_model_of_scaling_comes_to_what_a_play_of_its_messages_does(name, gpus, links):
    maker = load(ROOT / "docs" / "make_scaling.py")
    of = next(each for each in maker.MODELS if each.name == name)
    tokens, size = of.batch // gpus, 4 * of.parameters
    # A ring in each node, one over the nodes for each eighth, and a ring in each node again.
    nodes, seconds, sent = gpus // 8, 0.0, 0.0
    for members, part, rate in (
        (8, size / 8, 450e9),
        (nodes, size / 8 / nodes, 50e9 * links / 8),
        (nodes, size / 8 / nodes, 50e9 * links / 8),
        (8, size / 8, 450e9),
    ):
        for _ in range(members - 1):
            sent += part
            seconds += part / rate
    count = -(-size // (25 * 2**20))
    each = seconds / count + 2 * (gpus.bit_length() - 1) * 1e-5
    assert maker.sent(of.parameters, gpus) == pytest.approx(sent / 1e6)
    assert maker.fast_seconds(of.parameters, gpus, links) == pytest.approx((count, each))
    # The buckets of the last backward come one after another, and go one after another.
    arithmetic = of.seconds(tokens)
    backward = 2 / 3 * of.seconds(min(tokens, 8192))
    end = 0.0
    for number in range(1, count + 1):
        end = max(end, arithmetic - backward * (1 - number / count)) + each
    took = arithmetic / maker.efficiency(of, tokens, gpus, links)
    assert took == pytest.approx(end)


def test_every_link_in_the_documents_leads_to_a_file():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_each_config_is_valid(path):
    from truestep.config import resolve

    assert resolve({}, {}, path)
