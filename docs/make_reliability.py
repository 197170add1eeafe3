"""Write docs/reliability.md from the fault matrix below and from the figures of the long runs.

python docs/make_reliability.py
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent

HEAD = """# Reliability

The state of a run is its parameters with persistent buffers, its optimizer's state, and the step; everything else is computed from settings, data and step. So a run that is killed anywhere goes on from its last commit and ends with the same bits. This page says which faults that was shown for, by which test, and what was not shown. It is made by `make docs` from the tests' names and the figures of the two long runs, `make torture` and `make mutants`.

## When are the bits the same?

| setting | bit-exact resume |
|---|---|
| one process on a CPU, `deterministic` on (the default there), same build of torch, thread count, compilation and precision (all kept with the run and applied again) | yes: `test_resume`, `test_compile`, `test_replay` |
| another kind of CPU, another torch | not promised; said on resume |
| one GPU, `deterministic` on | yes, seen on one H200 with torch 2.11, compiled or not: `test_cuda`, skipped where there is none |
| 1, 2, 4 or 8 processes on one machine's CPU, `reduction = "exact"` | yes, also from one number to another: `test_parallel`, `test_launch` |
| several processes, `reduction = "fast"` | up to the order of sums |

## Faults

In each case: one line that names the file or field, what was expected and what was found; exit code 1 (2 for what you typed, 128 + n for a signal); the last committed checkpoint untouched; nothing lost but the steps since.

| fault | what happens | shown by |
|---|---|---|
"""

NOT_SHOWN = """
## What is not shown

- **Power loss is modelled**, not real: the model drops and reorders everything that POSIX lets a disk drop and reorder of what was not synced, garbage included. A disk that lies about fsync is outside of it.
- **A network file system** was not at hand; **a GPU** was, for a quarter of an hour: `test_cuda` passed on it (steps that never wait for the device, memory that truly ends in a step, runs that resume with the same bits); what else an accelerator does, records that come a step late or a flag on the device, is played on a CPU.
- **Several machines, or several GPUs**: processes that die or stall, and other numbers of them, were seen on one machine's CPU only (`test_launch`, `test_parallel`).
- **A flipped bit in a token shard** whose size is right is found by `truestep verify` (sha256), not while training reads it; an id outside the vocabulary, or a shard cut short, is found at once.
- **Memory that runs out** was shown on a CPU under a limit of address space; the kernel's own OOM killer is a SIGKILL, and shown as that.
- A log whose end holds garbage after a power loss **before the first checkpoint** is refused, with the line to remove.
"""


class Row(NamedTuple):
    """One row of the fault matrix, with the tests that show it as `file::start of the name`."""

    fault: str
    answer: str
    tests: tuple[str, ...]


ROWS = [
    Row(
        "kill -9 at random, also inside a save",
        "goes on from the last commit, bit-identical end; old or new checkpoint, never neither",
        (
            "test_kills.py::test_a_run_killed_in_every_phase",
            "test_cli.py::test_a_kill_loses_at_most",
            "test_changes.py::test_a_kill_while_a_smaller_size",
        ),
    ),
    Row(
        "kill before or inside I/O operation k of a save, all k",
        "the same",
        (
            "test_kills.py::test_a_kill_before_or_inside_any_operation",
            "test_checkpoint.py::test_whatever_fails_in_a_save",
        ),
    ),
    Row(
        "kill -9 while the model is compiled",
        "what torch's cache holds of it is removed and compiled anew",
        (
            "test_compile_cache.py::test_a_library_that_was_cut_anywhere",
            "test_compile_cache.py::test_a_run_compiles_anew",
        ),
    ),
    Row(
        "power loss",
        "the old or the new; what was committed stays (modelled)",
        (
            "test_power_loss.py::test_after_a_power_loss_at_any_moment",
            "test_power_loss.py::test_the_model_finds_what_is_wrong_with_a_careless_save",
            "test_sinks.py::test_garbage_behind_the_steps",
        ),
    ),
    Row(
        "disk full, EIO, short write",
        "old checkpoint kept; training goes on, loudly; gives up after `max_failed_saves`",
        (
            "test_disk_full.py::test_training_goes_on_over_a_full_disk",
            "test_disk_full.py::test_it_gives_up",
            "test_writer.py::test_at_every_operation_a_failing_disk",
        ),
    ),
    Row(
        "truncated or bit-flipped checkpoint",
        "found, named by file and byte range, set aside, the one before used, said",
        (
            "test_checkpoint.py::test_a_damaged_newest_is_set_aside",
            "test_checkpoint.py::test_no_flipped_bit_or_cut_in_a_manifest",
            "test_corruptions.py::test_whatever_is_damaged",
            "test_verify.py::test_one_changed_byte_anywhere",
        ),
    ),
    Row(
        "truncated or corrupt shard",
        "found at open (size) and by `verify` (sha256); a short read is an error",
        (
            "test_tokens.py::test_a_shard_cut_before_opening",
            "test_tokens.py::test_a_shard_cut_while_it_is_read",
            "test_verify.py::test_one_changed_byte_anywhere",
        ),
    ),
    Row(
        "token id outside the vocabulary",
        "error with shard, offset and id, before the forward pass",
        (
            "test_tokens.py::test_an_id_outside_the_vocabulary",
            "test_batch.py::test_an_id_outside_the_vocabulary",
            "test_fit.py::test_an_id_outside_the_vocabulary",
        ),
    ),
    Row(
        "wrong dtype, rank, shape, empty batch",
        "error naming what was given and what is wanted",
        ("test_batch.py::test_anything_else_is_refused_by_name",),
    ),
    Row(
        "NaN or inf in loss or gradient",
        "no bit changes; the run stops with a bundle that names the first bad module and replays "
        "in a fresh process; or skips up to `max_skipped_steps` in a row, counted in the log",
        (
            "test_step.py::test_a_non_finite_loss_or_gradient_changes_no_bit",
            "test_guard.py::test_steps_in_a_row_are_skipped",
            "test_replay.py::test_a_loss_that_is_not_finite_leaves_a_bundle",
            "test_diagnosis.py::test_every_module_of_the_reference_model_is_named_when_its_output",
        ),
    ),
    Row(
        "SIGTERM, SIGINT (and SIGHUP)",
        "finishes the step, saves, prints the command to go on; a second one leaves at once, but not "
        "the same within a second",
        (
            "test_interruptions.py::test_a_signal_at_any_moment",
            "test_interruptions.py::test_the_command_that_was_printed",
            "test_interruptions.py::test_the_same_signal_twice",
            "test_interruptions.py::test_a_second_signal_leaves_at_once",
            "test_cli.py::test_a_validation_that_a_signal_cut_off_is_made_up_for",
            "test_cli.py::test_a_terminal_that_is_closed_costs_nothing",
        ),
    ),
    Row(
        "a run's own settings or log edited, cut or lost",
        "settings: refused, and found by `verify`; a log that lacks steps: said, found by `verify`",
        (
            "test_faults_settings.py::test_a_changed_or_missing_line_of_the_run_s_own_settings",
            "test_changes.py::test_another_value_in_the_settings",
            "test_verify.py::test_going_on_after_the_log_lost_steps",
            "test_sinks.py::test_a_log_that_is_gone_from_its_place",
        ),
    ),
    Row(
        "settings changed on resume",
        "every refused change at once, with old and new value; allowed by name",
        (
            "test_faults_settings.py::test_a_changed_setting_that_the_bits_depend_on",
            "test_faults_settings.py::test_all_refused_changes",
            "test_replay.py::test_a_run_whose_settings_were_changed",
            "test_changes.py::test_a_kill_while_a_change",
        ),
    ),
    Row(
        "data edited, reordered, renamed",
        "refused by fingerprint",
        ("test_faults_settings.py::test_text_that_was_edited_reordered_or_renamed",),
    ),
    Row(
        "out of memory",
        "nothing half-saved; one line with a `micro_batch_size` that fits",
        (
            "test_faults_machine.py::test_the_size_that_is_said_to_fit_does_fit",
            "test_faults_machine.py::test_a_command_that_runs_out_of_memory",
        ),
    ),
    Row(
        "read-only or full directory at start",
        "found before data or model is touched, also on resume",
        (
            "test_faults_machine.py::test_a_full_disk_is_found",
            "test_faults_machine.py::test_a_read_only_place_is_found",
            "test_faults_machine.py::test_a_run_that_became_read_only_or_full",
        ),
    ),
    Row(
        "malicious checkpoint, config, run file or shard manifest",
        "no code runs, nothing is written outside of the run; no pickle is ever read",
        (
            "test_hostile.py::test_a_hostile_file_runs_nothing",
            "test_checkpoint.py::test_a_hostile_directory_runs_nothing",
            "test_house_rules.py::test_nothing_runs_what_it_reads",
        ),
    ),
    Row(
        "two writers, one run directory",
        "the second leaves at once, saying who holds it",
        (
            "test_checkpoint.py::test_a_second_process_is_kept_out",
            "test_cli.py::test_two_new_runs_never_share",
        ),
    ),
    Row(
        "control characters in names and text",
        "escaped in logs, messages and pages",
        (
            "test_page.py::test_hostile_names_and_texts_do_nothing",
            "test_display.py::test_a_pipe_gets_plain_lines",
            "test_faults_settings.py::test_each_problem_is_one_printable_line",
        ),
    ),
    Row(
        "evaluating, sampling, logging, drawing at any interval",
        "the same training bits, eager and compiled",
        (
            "test_fit.py::test_evaluating_and_sampling_randomness",
            "test_compile.py::test_the_compiled_step_agrees",
            "test_isolation.py::test_",
        ),
    ),
]


def find_test(start: str) -> str:
    """Return the whole name of a test of which `start` gives the file and the beginning."""
    file, _, beginning = start.partition("::")
    lines = (HERE.parent / "tests" / file).read_text(encoding="utf-8").splitlines()
    names = [line[4:].partition("(")[0] for line in lines if line.startswith(f"def {beginning}")]
    if not names:
        raise ValueError(f"tests/{file} has no test that begins with {beginning}")
    return names[0]


def fault_table() -> str:
    """Return the rows of the matrix, each with links to its tests."""
    lines = []
    for row in ROWS:
        links = [
            f"[{find_test(test).removeprefix('test_').replace('_', ' ')}]"
            f"(../tests/{test.partition('::')[0]})"
            for test in row.tests
        ]
        lines.append(f"| {row.fault} | {row.answer} | {'; '.join(links)} |\n")
    return "".join(lines)


def torture_section(record: dict[str, Any]) -> str:
    """Return the figures of `make torture`."""
    parts = record["parts"]
    kills, sweep, power = parts["random kills"], parts["sweep"], parts["power loss"]
    damaged = [parts["damaged checkpoint"], parts["damaged data"]]
    hostile = parts["hostile files"]
    hashes = kills["distinct_final_hashes"]
    rows = [
        ("kills at random moments", f"{kills['kills']:,}"),
        ("of these inside a save", f"{kills['kills_in_saves']:,}"),
        ("runs that came to their end", f"{kills['runs_finished']:,}"),
        ("corrupt commits", kills["laws"]["corrupt_commits"]),
        ("lost commits", kills["laws"]["lost_commits"]),
        (
            "distinct final hashes (AdamW, Muon), those of runs never killed",
            ", ".join(str(count) for count in hashes.values()),
        ),
        (
            "faults at each operation of a save in turn (kill, disk full, error, short write)",
            f"{sum(sweep['attempts'].values()):,}",
        ),
        ("of these that left neither the old nor the new", sweep["laws"]["broken"]),
        ("states a power loss may leave (modelled)", f"{power['states']:,}"),
        ("of these neither old nor new", power["laws"]["broken"]),
        ("corruptions tried", f"{sum(part['attempts'] for part in damaged):,}"),
        ("silent wrong loads", sum(part["laws"]["wrong_loads"] for part in damaged)),
        ("hostile files", f"{hostile['files']:,}"),
        ("code executions", hostile["laws"]["code_executions"]),
    ]
    where = f"{record['machine']}; torch {record['versions']['torch']}"
    phases = ", ".join(
        f"{name} {count:,}"
        for name, count in {**kills["kills_by_phase"], **kills["saves_killed_by_phase"]}.items()
    )
    return (
        f"\n## A long run of faults\n\n`make torture` on {where}, {record['seconds']:,.0f} s "
        "([all of it](torture.json)):\n\n| | |\n|---|---|\n"
        + "".join(f"| {name} | {value} |\n" for name, value in rows)
        + f"\nKills by phase: {phases}.\n"
    )


def mutants_section(rows: list[dict[str, Any]]) -> str:
    """Return the table of `make mutants`."""
    caught = sum(row["caught_by"] is not None for row in rows)
    table = "".join(
        f"| {row['bug']} | `{row['file']}` | "
        f"`{(row['caught_by'] or 'nothing').partition('::')[2].partition('[')[0] or 'nothing'}` |\n"
        for row in rows
    )
    return (
        f"\n## Planted bugs\n\n`make mutants` plants the bugs that others have shipped, and some "
        f"against promises of our own, one at a time: {len(rows)} planted, {caught} caught "
        "([all of it](mutants.json))."
        "\n\n| bug | planted in | first test that fails |\n|---|---|---|\n" + table
    )


def make_reliability() -> str:
    """Return the page."""
    torture = json.loads((HERE / "torture.json").read_text(encoding="utf-8"))
    mutants = json.loads((HERE / "mutants.json").read_text(encoding="utf-8"))
    return HEAD + fault_table() + NOT_SHOWN + torture_section(torture) + mutants_section(mutants)


if __name__ == "__main__":
    (HERE / "reliability.md").write_text(make_reliability(), encoding="utf-8")
