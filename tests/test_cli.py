"""The command, as a stranger types it: from text to a trained model, and every wrong turn."""

import dataclasses
import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from truestep import Trainer
from truestep.cli import main
from truestep.observe.sinks import JsonlSink

TINY = """
[training]
num_steps = 12
learning_rate = 1e-2
micro_batch_size = 3
schedule = "cosine"

[model]
context_length = 16
num_layers = 1
num_heads = 2
width = 16
dropout = 0.1

[data]
batch_size = 4

[run]
evaluate_every = 6
save_every = 4
log_every = 1
sample_tokens = 20
evaluation_windows = 4
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty directory with a text and a config, and nothing in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("TRUESTEP_"):
            monkeypatch.delenv(name)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def train(*arguments):
    data = [] if "--data" in arguments else ["--data", "text.txt"]
    return main(["train", "tiny.toml", *data, *arguments])


def interrupted(after_step, number, *arguments):
    """Train in a process of its own and send it a signal after a step; return code and output."""
    command = [sys.executable, "-m", "truestep", "train", "tiny.toml", "--data", "text.txt"]
    lines = []
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith(f"step {after_step} "):
                process.send_signal(number)
    return process.returncode, "".join(lines)


def test_a_vocabulary_larger_than_the_tokenizers_writes_text_and_is_planned(capsys):
    size = ["--model.vocab_size", "5000"]  # a first sample of 20 tokens is never of bytes alone
    assert main(["plan", "tiny.toml", "--data", "text.txt", *size]) == 0
    assert train("--run.name", "padded", *size) == 0
    samples = Path("runs/padded/samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in samples] == [6, 12]
    assert main(["sample", "runs/padded", "--prompt", "the "]) == 0
    assert "Traceback" not in "".join(capsys.readouterr())


def log_of(run):
    """A run's records without what depends on the clock."""
    records = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    clock = {"step_seconds", "tokens_per_second"}
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def weights_of(run, step):
    directory = Path(run, "checkpoints", f"step-{step}")
    return [(directory / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def test_text_to_trained_model_to_sample_evaluation_and_report(capsys):
    assert train() == 0
    out = capsys.readouterr().out
    assert "validation loss" in out
    assert "bits per byte" in out
    assert "sample at step 12" in out
    assert "Try next:" in out
    run = Path("runs/text-1")
    for name in ("config.toml", "manifest.json", "metrics.jsonl", "samples.jsonl", "report.html"):
        assert (run / name).is_file(), name
    assert (run / "plots/loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == ["step-12", "step-8"]
    steps = [record["step"] for record in log_of(run) if "loss" in record]
    assert steps == list(range(1, 13))
    assert main(["sample", "--prompt", "the ", "--tokens", "30"]) == 0
    assert capsys.readouterr().out.startswith("the ")
    assert main(["evaluate"]) == 0
    last = [record for record in log_of(run) if "validation_loss" in record][-1]
    measured = float(re.search(r"loss (\d+\.\d+)", capsys.readouterr().out)[1])
    assert measured == pytest.approx(last["validation_loss"], rel=5e-3)  # float32 here, bf16 there
    assert main(["evaluate", str(run), "--data", "text.txt"]) == 0
    assert main(["report", str(run)]) == 0


def test_a_checkpoint_is_chosen_by_being_newest_best_or_by_its_step(capsys):
    every_step = ["--run.evaluate-every", "1", "--run.evaluation-windows", "9999"]
    assert train(*every_step) == 0
    worse = ["--training.num-steps", "15", "--training.learning-rate", "9"]
    allow = ["--override", "training.num_steps", "--override", "training.learning_rate"]
    assert main(["train", "--resume", "auto", *worse, *allow]) == 0
    losses = {r["step"]: r["validation_loss"] for r in log_of("runs/text-1") if len(r) == 3}
    best = min(losses, key=losses.get)
    assert best <= 12
    capsys.readouterr()
    for arguments, step in [([], 15), (["best"], best), (["newest"], 15), (["14"], 14)]:
        choice = ["--checkpoint", *arguments] if arguments else []
        assert main(["evaluate", *choice]) == 0
        out = capsys.readouterr().out
        assert f"at step {step} on its validation text" in out
        assert main(["sample", "--tokens", "3", *choice]) == 0
    assert main(["sample", "--checkpoint", "7.5"]) == 2
    assert "has none such; use newest, best" in capsys.readouterr().err


def test_the_resolved_config_repeats_the_run_bit_for_bit():
    assert train() == 0
    assert main(["train", "runs/text-1/config.toml", "--run.name", "again"]) == 0
    assert weights_of("runs/again", 12) == weights_of("runs/text-1", 12)
    kept = Path("runs/text-1/config.toml").read_text()
    assert kept.count('"auto"') == kept.count('validation = "auto"') == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_resume_is_bit_identical(number):
    assert train("--training.num-steps", "40", "--run.name", "whole") == 0
    code, text = interrupted(3, number, "--training.num-steps", "40", "--run.name", "cut")
    assert code == 128 + number, text
    assert "train --resume runs/cut" in text
    stopped_at = int(re.search(r"at step (\d+)", text)[1])
    assert 3 <= stopped_at < 40
    assert main(["train", "--resume", "runs/cut"]) == 0
    assert log_of("runs/cut") == log_of("runs/whole")
    assert weights_of("runs/cut", 40) == weights_of("runs/whole", 40)


def test_a_signal_after_the_last_step_changes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(
        "truestep.workflows.train.draw_plots", lambda run: signal.raise_signal(signal.SIGTERM)
    )
    assert train() == 0
    assert "Try next:" in capsys.readouterr().out


def on_a_terminal(command, end):
    """Run a command on a terminal of its own, `end` it after its fifth step; return the code."""
    ours, theirs = pty.openpty()

    def control():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever tests may be under nohup
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, preexec_fn=control, **streams) as process:
        os.close(theirs)
        log = Path("runs/cut/metrics.jsonl")
        while not log.exists() or len(log.read_bytes().splitlines()) < 5:
            if select.select([ours], [], [], 0.05)[0]:
                os.read(ours, 65536)
        end(process, ours)
        return process.wait(60)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="terminals differ elsewhere")
def test_a_terminal_that_is_closed_costs_nothing():
    rare = ["--training.num-steps", "100000", "--run.save-every", "1000000"]
    command = [sys.executable, "-m", "truestep", "train", "tiny.toml", "--data", "text.txt"]
    arguments = [*rare, "--run.evaluate-every", "1000000", "--run.name", "cut"]
    code = on_a_terminal([*command, *arguments], lambda process, terminal: os.close(terminal))
    assert code == 128 + signal.SIGHUP
    (saved,) = Path("runs/cut/checkpoints").glob("step-*")
    assert saved.name == f"step-{log_of('runs/cut')[-1]['step']}"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="terminals differ elsewhere")
def test_nohup_is_heeded():
    command = [sys.executable, "-m", "truestep", "train", "tiny.toml", "--data", "text.txt"]
    shell = f"trap '' HUP; exec {shlex.join([*command, '--training.num-steps', '60'])}"

    def hang_up(process, terminal):
        process.send_signal(signal.SIGHUP)

    arguments = ["sh", "-c", f"{shell} --run.name cut > out.txt 2>&1"]
    assert on_a_terminal(arguments, hang_up) == 0
    assert log_of("runs/cut")[-1]["step"] == 60


def test_a_validation_that_a_signal_cut_off_is_made_up_for_and_ranks_its_checkpoint(monkeypatch):
    # The losses fall, then rise: step 6 is the best, and the signal comes just there.
    real = Trainer.evaluate

    def measured(trainer, *arguments, **keywords):
        result = real(trainer, *arguments, **keywords)
        return dataclasses.replace(result, loss=abs(trainer.step - 6.0) + 1)

    monkeypatch.setattr(Trainer, "evaluate", measured)
    write = JsonlSink.write

    def interrupt(sink, record):
        write(sink, record)
        if record["step"] == 6 and "loss" in record:
            signal.raise_signal(signal.SIGTERM)

    often = ["--run.evaluate-every", "3", "--run.save-every", "99", "--training.num-steps", "18"]
    with monkeypatch.context() as patch:
        patch.setattr(JsonlSink, "write", interrupt)
        assert train(*often, "--run.name", "cut") == 143
    assert main(["train", "--resume", "runs/cut"]) == 0
    assert train(*often, "--run.name", "whole") == 0
    assert log_of("runs/cut") == log_of("runs/whole")
    samples = [Path("runs", run, "samples.jsonl").read_text() for run in ("cut", "whole")]
    assert samples[0] == samples[1]
    for run in ("cut", "whole"):
        kept = {path.name for path in Path("runs", run, "checkpoints").glob("step-*")}
        assert kept == {"step-6", "step-15", "step-18"}


def test_a_kill_loses_at_most_the_steps_since_the_last_checkpoint():
    assert train("--run.name", "whole") == 0
    code, text = interrupted(6, signal.SIGKILL, "--run.name", "cut")
    assert code == -signal.SIGKILL, text
    assert main(["train", "--resume", "auto", "--run.name", "cut"]) == 0
    assert log_of("runs/cut") == log_of("runs/whole")
    assert weights_of("runs/cut", 12) == weights_of("runs/whole", 12)


def test_resume_refuses_what_changes_the_bits_unless_overridden_and_takes_the_rest(capsys):
    assert train() == 0
    run = "runs/text-1"
    assert main(["train", "--resume", run, "--training.seed", "9"]) == 2
    assert "training.seed was 0 in this run and is now 9" in capsys.readouterr().err
    assert main(["train", "--resume", run, "--training.num-steps", "14"]) == 2
    assert "--override training.num_steps" in capsys.readouterr().err
    override = ["--training.num-steps", "14", "--override", "training.num_steps"]
    assert main(["train", "--resume", run, "--run.log-every", "2", *override]) == 0
    assert [r["step"] for r in log_of(run) if "loss" in r] == list(range(1, 15))
    assert main(["train", "--resume", run, "--override", "training.sed"]) == 2
    assert "did you mean training.seed" in capsys.readouterr().err


def test_resume_refuses_edited_text(capsys):
    assert train() == 0
    Path("text.txt").write_text("another text altogether\n" * 300)
    assert main(["train", "--resume", "runs/text-1"]) == 2
    assert "is not the text this run began with" in capsys.readouterr().err


def test_a_run_below_the_text_never_becomes_its_text():
    Path("more.md").write_text("some more prose\n" * 100)
    assert train("--data", ".") == 0
    assert main(["train", "--resume", "auto"]) == 0


def test_the_environment_says_where_runs_lie_for_every_command(monkeypatch, capsys):
    monkeypatch.setenv("TRUESTEP_RUN__DIRECTORY", "elsewhere")
    assert train() == 0
    assert Path("elsewhere/text-1/report.html").is_file()
    assert main(["sample", "--tokens", "5"]) == 0
    assert main(["report"]) == 0
    monkeypatch.setenv("TRUESTEP_RUN__NAMES", "x")
    assert main(["evaluate"]) == 2
    assert "TRUESTEP_RUN__NAMES names no setting" in capsys.readouterr().err


def test_a_run_is_read_from_another_directory_without_a_trace_there(monkeypatch, workplace):
    assert train() == 0
    before = Path("runs/text-1/config.toml").read_text()
    Path("below").mkdir()
    monkeypatch.chdir(workplace / "below")
    assert main(["evaluate", "../runs/text-1"]) == 0
    assert main(["train", "--resume", "../runs/text-1"]) == 0
    assert not list(Path().iterdir())
    assert Path("../runs/text-1/config.toml").read_text() == before


def test_evaluation_skips_what_is_no_text_in_a_directory(capsys):
    assert train() == 0
    Path("folder").mkdir()
    Path("folder/good.txt").write_text("good text\n" * 50)
    Path("folder/bad.txt").write_bytes(b"\xff\xfe" * 50)
    assert main(["evaluate", "--data", "folder"]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(capsys):
    assert train() == 0
    for path in Path("runs/text-1/checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(b"broken")
    assert main(["sample"]) == 2
    assert main(["train", "--resume", "auto"]) == 2
    assert "no intact checkpoint left" in capsys.readouterr().err
    assert len(log_of("runs/text-1")) > 12


def test_evaluation_refuses_text_that_is_no_longer_the_runs_own(capsys):
    assert train() == 0
    Path("text.txt").write_text("another text altogether\n" * 300)
    assert main(["evaluate"]) == 2
    assert "is not the text this run began with" in capsys.readouterr().err
    assert main(["prepare", "text.txt", "--out", "prepared"]) == 0
    assert main(["evaluate", "--data", "prepared"]) == 0


def test_a_reader_who_leaves_does_not_end_the_run():
    command = f"{sys.executable} -m truestep train tiny.toml --data text.txt | head -n 1"
    subprocess.run(command, shell=True, capture_output=True, check=False)
    assert Path("runs/text-1/checkpoints/step-12").is_dir()


def test_a_run_without_an_output_trains():
    command = f"{sys.executable} -m truestep train tiny.toml --data text.txt >&-"
    assert subprocess.run(command, shell=True, capture_output=True, check=False).returncode == 0


def test_a_signal_while_storage_is_being_imported_ends_the_command_as_any_other():
    program = """
import signal, sys, types
from truestep.cli import _leave
sys.modules["truestep.storage"] = types.ModuleType("truestep.storage")  # so far
_leave(signal.SIGTERM, None)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (143, b"error: interrupted\n")


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.7])
def test_a_signal_at_start_up_ends_it_without_a_traceback_or_a_run(seconds):
    command = [sys.executable, "-m", "truestep", "train", "tiny.toml", "--data", "text.txt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        error = process.stderr.read()
    assert b"Traceback" not in error
    assert process.returncode in {-signal.SIGTERM, 128 + signal.SIGTERM}
    assert not [p for p in Path().glob("runs/*") if not p.name.startswith(".")]


def test_two_new_runs_never_share_a_directory():
    from truestep.config import RunSettings
    from truestep.workflows.run import claim_directory

    Path("runs").mkdir()
    claimed = [claim_directory(RunSettings(), "text.txt") for _ in range(3)]
    assert len(set(claimed)) == 3


def test_resume_auto_without_a_run_starts_one(capsys):
    assert train("--resume", "auto") == 0
    assert "starting a new one" in capsys.readouterr().out
    assert Path("runs/text-1/checkpoints/step-12").is_dir()


def test_a_prepared_directory_trains_like_the_text_itself():
    assert main(["prepare", "text.txt", "--out", "prepared"]) == 0
    assert train() == 0
    assert main(["train", "tiny.toml", "--data", "prepared"]) == 0
    assert weights_of("runs/prepared-1", 12) == weights_of("runs/text-1", 12)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data", "missing.txt"], 2, ["missing.txt", "neither a file"]),
        (["--data", "txt.txt"], 2, ["did you mean", "text.txt"]),
        (["--data", "empty.txt"], 2, ["empty.txt", "empty"]),
        (["--data", "short.txt"], 2, ["context_length=16", "shorter context or more text"]),
        (["--data", "binary.txt"], 2, ["binary.txt", "UTF-8"]),
        (["--data", "folder"], 2, ["folder", "no text"]),
        (["--data.batch-size", "0"], 2, ["data.batch_size=0", "greater than 0"]),
        (["--model.context-length=-3"], 2, ["model.context_length=-3"]),
        (["--training.betas", "0.9", "1.5"], 2, ["training.betas", "less than 1"]),
        (["--training.warmup-steps", "99"], 2, ["warmup_steps=99", "num_steps=12"]),
        (["--training.lerning-rate", "1"], 2, ["--training.learning-rate"]),
        (["--model.vocab-size", "100"], 2, ["model.vocab_size=100", "auto"]),
        (["--run.name", "../escape"], 2, ["run.name", "plain name"]),
        (["--run.name", ""], 2, ["run.name", "plain name"]),
        (["--run.threads", "100000"], 2, ["run.threads=100000", "1024"]),
        (["--override", "training.seed"], 2, ["--override", "--resume"]),
        (["--run.name", ".."], 2, ["run.name", "plain name"]),
        (["--run.name=-a"], 2, ["run.name", "must not begin with . or -"]),
        (["--run.name", "a" * 101], 2, ["run.name has 101 characters; use at most 100"]),
        (["--data", "/dev/null"], 2, ["'/dev/null' is a pipe or a device"]),
        (["--run.name", "a/b"], 2, ["run.name", "plain name"]),
        (["--run.name", "a\x1b[31m"], 2, ["run.name", "plain name"]),
        (["--run.directory", "text.txt"], 2, ["run.directory=text.txt", "--run.directory"]),
        (["--run.device", "cuda:99"], 2, ["device=cuda:99", "cpu or auto"]),
        (["--resume", "nowhere"], 2, ["nowhere", "not a run"]),
        (["--data.validation", "missing.txt"], 2, ["missing.txt"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_half_written_run(arguments, code, words, capsys):
    Path("empty.txt").touch()
    Path("short.txt").write_text("too short")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 50)
    Path("folder").mkdir()
    assert train(*arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1, error
    assert all(word in error for word in words), error
    assert "Traceback" not in error
    left = [p for p in Path().glob("runs/*") if not p.name.startswith(".")]
    assert not left
    assert not Path("../escape").exists()


def test_an_unwritable_run_directory_is_said_before_anything_is_done(capsys, workplace):
    if os.geteuid() == 0:
        Path("runs").write_text("a file in the way")  # root may write anywhere else
    else:
        Path("runs").mkdir(mode=0o500)
    assert train() == 2
    assert "run.directory=runs cannot be written" in capsys.readouterr().err


def test_a_taken_name_is_refused_with_the_way_to_go_on(capsys):
    assert train("--run.name", "mine") == 0
    assert train("--run.name", "mine") == 2
    assert "--resume runs/mine" in capsys.readouterr().err


def test_a_run_that_was_killed_as_it_began_begins_again_under_its_name(capsys):
    for leftovers in ([], [".lock", "manifest.json", "tokenizer.json"]):
        directory = Path("runs") / f"mine-{len(leftovers)}"
        directory.mkdir(parents=True)
        for name in leftovers:
            (directory / name).touch()
        assert train("--run.name", directory.name, "--resume", "auto") == 0
        assert "starting a new one" in capsys.readouterr().out
        assert (directory / "report.html").exists()
    (Path("runs") / "notes").mkdir()
    (Path("runs") / "notes" / "todo.txt").touch()
    assert train("--run.name", "notes", "--resume", "auto") == 2
    assert "run.name=notes: runs/notes exists already" in capsys.readouterr().err


def test_help_version_and_wrong_commands(capsys):
    assert main(["--help"]) == 0
    assert "Train a model on text" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert re.match(r"\d+\.\d+\.\d+", capsys.readouterr().out)
    assert main(["trian"]) == 2
    assert 'Did you mean "train"' in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["train"], ["sample"], ["prepare"], ["evaluate"]])
def test_help_never_imports_torch(command):
    code = f"import sys; from truestep.cli import main; main({[*command, '--help']!r}); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


def test_python_m_truestep_is_the_command():
    command = [sys.executable, "-m", "truestep", "--version"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_environment_and_file_reach_the_run(monkeypatch):
    monkeypatch.setenv("TRUESTEP_TRAINING__NUM_STEPS", "3")
    assert train() == 0
    assert [r["step"] for r in log_of("runs/text-1") if "loss" in r] == [1, 2, 3]
