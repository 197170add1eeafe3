"""The house keeps its order: imports point downward, and the public surface is pinned."""

import ast
import subprocess
import sys
from pathlib import Path

import truestep

SOURCE = Path(truestep.__file__).parent
LEVELS = {
    "settings": 0,
    "setting_sources": 0,
    "config": 0,
    "batch": 0,
    "compile_cache": 0,
    "gpus": 0,
    "loss": 0,
    "manifest": 0,
    "metrics": 0,
    "shell": 0,
    "storage": 0,
    "compiler": 1,
    "machine": 1,
    "runtime": 1,
    "data": 1,
    "distributed": 1,
    "model": 1,
    "observe": 1,
    "training": 2,
    "checkpoint": 2,
    "workflows": 3,
    "cli": 4,
}


def imports():
    """Yield (importing module, imported module) inside the package, type-checking ones included."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{path}: relative import"
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                target = name.removeprefix("truestep.")
                if target != name and target.split(".")[0] in LEVELS:
                    yield module, target


def test_imports_point_downward_or_stay_level_without_a_circle():
    rooms = {}
    for module, target in imports():
        room, other = module.split(".")[0], target.split(".")[0]
        if room in {"", "__main__"} or room == other:
            continue
        assert LEVELS[other] <= LEVELS[room], f"{module} imports {target} from above"
        rooms.setdefault(room, set()).add(other)
    for start in rooms:
        seen, frontier = set(), {start}
        while frontier:
            frontier = {n for room in frontier for n in rooms.get(room, ())} - seen
            seen |= frontier
        assert start not in seen, f"{start} imports itself in a circle"


def test_every_room_has_a_level():
    names = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names - {"__init__", "__main__", "__pycache__", "py"} == set(LEVELS)


def test_only_one_file_reads_the_environment_and_one_touches_the_process():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert "getenv" not in text, path
        if path.parent.name == "cli":  # hands it to `resolve`, and to nothing else
            assert text.count("os.environ") == text.count("os.environ)") + text.count(
                "os.environ, "
            )
        elif path.name == "runtime.py":  # tells other libraries: one for the time of a call
            before = text.partition("def tokenizers_on_one_thread")[0]
            assert text.count("os.environ") == 5 > before.count("os.environ") == 1
            assert before.count('os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG"') == 1
        elif path.name == "process.py":  # what torchrun says
            assert text.count("os.environ") == 1
        else:
            assert "os.environ" not in text, path
        if path.name != "runtime.py":
            for call in ("set_num_threads", "manual_seed(", "use_deterministic_algorithms("):
                lines = [line for line in text.splitlines() if call in line]
                assert all("Generator" in line or "generator" in line for line in lines), path


def test_the_public_surface_is_pinned_and_loads():
    assert sorted(truestep.__all__) == sorted(truestep._MODULES)
    for name in truestep.__all__:
        assert getattr(truestep, name) is not None
    assert truestep.__all__ == [
        "GPT",
        "IGNORE_INDEX",
        "Batch",
        "CheckpointError",
        "CheckpointWriter",
        "ConfigError",
        "ConsoleSink",
        "DeferredLogits",
        "Estimate",
        "Evaluation",
        "GPTConfig",
        "JsonlSink",
        "NonFiniteError",
        "RunConfig",
        "Sink",
        "StepMetrics",
        "Trainer",
        "TrainingConfig",
        "compute_loss",
        "constant",
        "estimate",
        "evaluate",
        "every",
        "generate",
        "load_bundle",
        "load_checkpoint",
        "save_bundle",
        "save_checkpoint",
        "warmup_cosine",
        "warmup_stable_decay",
    ]


def test_reading_settings_imports_no_torch():
    code = "import sys, truestep; truestep.RunConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
