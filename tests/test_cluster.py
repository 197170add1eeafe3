"""The templates for clusters, as far as they can be seen to work without one: two processes here.

Slurm's own commands are played by two scripts; of Kubernetes and SkyPilot there are the variables
that they set for a command.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from truestep.checkpoint.commit import list_checkpoints

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster"
SLURM = (CLUSTER / "slurm.sh").read_text()
SKYPILOT = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
RUNTIME, TRAINJOB = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
CONFIG = """
[data]
source = "/shared/text.txt"
[model]
width = 64
num_layers = 2
context_length = 128
[training]
num_steps = 500
compile = "off"
[run]
threads = 1
log_every = 1
device = "cpu"
save_every = 1000
evaluate_every = 1000
"""

# What the templates use of each description, by the names and types of its reference; no more.
ENV = [{"name": str, "value": str}]
POD = {
    "terminationGracePeriodSeconds": int,
    "containers": [{"name": str, "image": str, "volumeMounts": [{"name": str, "mountPath": str}]}],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
JOB = {
    "name": str,
    "template": {
        "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": str}},
        "spec": {"backoffLimit": int, "template": {"spec": POD}},
    },
}
SHAPES = {
    "runtime": {
        "apiVersion": str,
        "kind": str,
        "metadata": {"name": str, "labels": {"trainer.kubeflow.org/framework": str}},
        "spec": {
            "mlPolicy": {"numNodes": int, "torch": {}},
            "template": {"spec": {"replicatedJobs": [JOB]}},
        },
    },
    "trainjob": {
        "apiVersion": str,
        "kind": str,
        "metadata": {"name": str},
        "spec": {
            "runtimeRef": {"kind": str, "name": str},
            "trainer": {
                "numNodes": int,
                "numProcPerNode": int,
                "resourcesPerNode": {"limits": {"nvidia.com/gpu": int}},
                "command": [str],
                "env": ENV,
            },
        },
    },
    "skypilot": {
        "name": str,
        "num_nodes": int,
        "resources": {
            "infra": str,
            "accelerators": str,
            "use_spot": bool,
            "job_recovery": {"max_restarts_on_errors": int},
        },
        "volumes": {"/shared": str},
        "envs": {"OMP_NUM_THREADS": str, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str},
        "setup": str,
        "run": str,
    },
}


def faults(value, shape, place=""):
    """Yield where a value has not the shape: fields that lack or are unknown, and wrong types."""
    if isinstance(shape, type):
        if type(value) is not shape:
            yield f"{place} is no {shape.__name__}"
    elif type(value) is not type(shape):
        yield f"{place} is no {type(shape).__name__}"
    elif isinstance(shape, list):
        for number, each in enumerate(value):
            yield from faults(each, shape[0], f"{place}[{number}]")
    else:
        yield from (f"{place}/{name}" for name in sorted(value.keys() ^ shape.keys()))
        for name in value.keys() & shape.keys():
            yield from faults(value[name], shape[name], f"{place}/{name}")


def options():
    """Return the options of the Slurm template, which sbatch reads up to the first command."""
    head = SLURM.partition("\nset ")[0]
    lines = re.findall(r"^#SBATCH (.*)$", head, re.MULTILINE)
    assert len(lines) == SLURM.count("#SBATCH")
    return dict(re.fullmatch(r"--([a-z-]+)(?:=(\S+))?", line).groups() for line in lines)


def words(script):
    """Return the words of the command in a script that starts torchrun, without a final `&`."""
    command = script[script.index("torchrun --nnodes") :].replace("\\\n", " ").splitlines()[0]
    return [word for word in shlex.split(command) if word != "&"]


def inner(command):
    """Return what torchrun is to run: `-m` and all after it, each value a word of its own."""
    return [part for word in command[command.index("-m") :] for part in word.split("=")]


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_each_template_is_short(path):
    assert len(path.read_text().splitlines()) <= 80


@pytest.mark.parametrize("script", [SLURM, SKYPILOT["run"], SKYPILOT["setup"]])
def test_each_script_is_one_that_bash_can_read(script):
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_each_description_has_the_fields_and_types_of_its_reference():
    for name, value in (("runtime", RUNTIME), ("trainjob", TRAINJOB), ("skypilot", SKYPILOT)):
        assert list(faults(value, SHAPES[name])) == []
    wrong = {"name": 1, "env": [{"name": "A", "value": 8}], "much": {}}
    assert set(faults(wrong, {"name": str, "env": ENV, "few": {}})) == {
        *("/name is no str", "/env[0]/value is no str", "/much", "/few"),
    }
    assert options().keys() == {
        *("job-name", "output", "open-mode", "nodes", "ntasks-per-node", "gpus-per-node"),
        *("cpus-per-task", "time", "requeue", "signal"),
    }


def test_what_refers_to_something_else_names_it():
    assert TRAINJOB["apiVersion"] == RUNTIME["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    metadata = RUNTIME["metadata"]
    assert TRAINJOB["spec"]["runtimeRef"] == {"kind": RUNTIME["kind"], "name": metadata["name"]}
    (job,) = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,), (volume,) = pod["containers"], pod["volumes"]
    assert job["name"] == container["name"] == "node"  # where a TrainJob's command goes
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]


def test_all_start_the_same_training():
    commands = [words(SLURM), words(SKYPILOT["run"]), TRAINJOB["spec"]["trainer"]["command"]]
    assert [inner(command) for command in commands] == [inner(commands[0])] * 3
    for command in commands:
        assert "--max-restarts 3" in " ".join(command).replace("=", " ")


def test_processes_have_less_time_to_end_than_their_machine():
    (job,) = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
    grace = job["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    env = {each["name"]: each["value"] for each in TRAINJOB["spec"]["trainer"]["env"]}
    (wait,) = re.findall(r"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", SLURM)
    warned = options()["signal"]
    assert warned.startswith("B:USR1@")  # to the script alone: a user's scancel sends another
    assert int(wait) < int(warned.partition("@")[2])
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace


def free_port(ports):
    """Return the first port that nobody listens on."""
    for port in ports:
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port
    raise AssertionError("no port is free")


@pytest.fixture
def start(tmp_path):
    """Start a command with an environment of its own; what lies in /shared lies in tmp_path."""
    started = []
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def start(command, **environ):
        command = [word.replace("/shared", str(tmp_path)) for word in command]
        said = tmp_path / f"said-{len(started)}"
        with said.open("w") as stream:
            started.append(
                subprocess.Popen(
                    command,
                    env=os.environ | {"PATH": path} | environ,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
            )
        return started[-1], said

    yield start
    for running in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)


def wait_for(steps, running, said):
    """Wait until so many steps are done."""
    until = time.monotonic() + 120
    while said.read_text().count("  grad norm ") < steps:
        assert running.poll() is None, said.read_text()
        assert time.monotonic() < until, said.read_text()
        time.sleep(0.02)


def test_a_run_begins_under_slurm_and_goes_on_as_a_trainjob(start, tmp_path):
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(200_000))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "train.toml").write_text(CONFIG.replace("/shared", str(tmp_path)))
    (tmp_path / "bin").mkdir()
    for name, lines in {
        "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
        "scontrol": f'if [ $1 = show ]; then echo localhost; else echo "$@" >{tmp_path}/asked; fi',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def saved():
        return max(step for step, _ in list_checkpoints(tmp_path / "runs/my-run/checkpoints"))

    job = str(free_port(range(20000 + os.getpid() % 5000, 30000)) - 20000)
    slurm = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1"}
    slurm |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2"}
    running, said = start(["bash", "-c", SLURM], **slurm)
    wait_for(3, running, said)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=60) != 0
    first = saved()
    assert f"stopped by SIGTERM at step {first}; nothing is lost" in said.read_text()
    assert "starting a new one" in said.read_text()
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"

    # Every process hears of the end, as when a whole machine shuts down, and torchrun tells it too.
    port = str(free_port(range(30000 + os.getpid() % 1000, 32000)))
    pet = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0"}
    pet |= {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": port}
    running, said = start(TRAINJOB["spec"]["trainer"]["command"], **pet)
    wait_for(3, running, said)
    os.killpg(running.pid, signal.SIGTERM)
    assert running.wait(timeout=60) != 0
    assert re.search(rf"going on from \S+/step-{first}\n", said.read_text())
    second = saved()
    assert second > first
    assert f"stopped by SIGTERM at step {second}; nothing is lost" in said.read_text()
    runs = [path.name for path in (tmp_path / "runs").glob("[!.]*")]
    assert runs == ["my-run"]


def test_skypilots_variables_come_to_torchrun_as_numbers_and_the_first_address(tmp_path):
    (tmp_path / "torchrun").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    told = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1"}
    told |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.check_output(["bash", "-c", SKYPILOT["run"]], env=told, text=True)
    assert said.startswith(
        "--nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500 "
    )
