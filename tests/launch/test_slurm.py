"""A real SLURM of two nodes on this machine: jobs train, leave on a signal, come back, and end as if undisturbed."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from babl.data.fictional import fictional_corpus

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=debug Nodes=n1,n2 Default=YES State=UP
"""

pytestmark = pytest.mark.slurm


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Slurm:
    """A cluster of one's own: its daemons are children of the test, and end with it."""

    def __init__(self, folder):
        self.folder, self.daemons = folder, []
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self):
        folder = self.folder
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        conf = CONF.format(
            host=socket.gethostname().partition(".")[0],
            ports=free_ports(3),
            folder=folder,
            user=os.environ.get("USER", "root"),
        )
        (folder / "slurm.conf").write_text(conf)
        munge = {"socket": "munge.socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = [f"--{option}={folder / name}" for option, name in munge.items()]
        self.daemon("munged", "--foreground", "--force", *paths)
        self.wait_for((folder / "munge.socket").exists)
        self.daemon("slurmctld", "-D", "-i")
        self.daemon("slurmd", "-D", "-N", "n1")
        self.daemon("slurmd", "-D", "-N", "n2")
        self.wait_for(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == "2")

    def daemon(self, *command):
        with (self.folder / f"{command[0]}-{len(self.daemons)}.out").open("w") as output:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=output, stderr=output))

    def ask(self, *command, check=True):
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, script, *arguments, options=(), **environment):
        command = ["sbatch", "--parsable", f"--output={self.folder}/job-%j.out", *options, str(script), *arguments]
        done = subprocess.run(
            command, env=self.environment | environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def job(self, job):
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "--oneliner", job)))

    def output(self, job):
        path = self.folder / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def wait_for(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(daemon.poll() is None for daemon in self.daemons), "a daemon has ended"
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def wait_until_completed(self, job, seconds=120):
        self.wait_for(lambda: self.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds)
        assert self.job(job)["JobState"] == "COMPLETED", self.output(job)

    def end(self):
        if len(self.daemons) == 4:
            self.ask("scancel", "--me", check=False)
            deadline = time.monotonic() + 20
            while self.ask("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.skip(f"no SLURM here: {', '.join(missing)} missing (Debian: apt-get install slurm-wlm munge)")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()


def test_a_job_over_two_nodes_is_preempted_comes_back_and_ends_as_if_undisturbed(slurm, runs):
    script = str(runs.edited("import time; time.sleep(0.3)"))
    train, options = ROOT / "launch" / "train.sbatch", ["--nodes=2"]
    undisturbed = slurm.submit(train, *runs.arguments("undisturbed"), options=options, SCRIPT=script)
    slurm.wait_until_completed(undisturbed)
    assert "resumed from" not in slurm.output(undisturbed)

    job = slurm.submit(train, *runs.arguments("run"), options=options, SCRIPT=script)
    (runs.folder / "dev.json").write_text(json.dumps(fictional_corpus(1, 1)[1]))
    checkpoint, out = runs.folder / "run" / "checkpoints" / "latest", runs.folder / "dev"
    evaluation = slurm.submit(
        ROOT / "launch" / "eval.sbatch",
        *map(str, (checkpoint, runs.folder / "dev.json", "--limit", 3, "--max-source-tokens", 128, "--stride", 16)),
        *("--out", str(out)),
        options=[f"--dependency=afterok:{job}"],
    )
    slurm.wait_for(lambda: runs.last_step("run") >= 3)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1 does before the time limit
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "1")
    stopped_at = runs.last_step("run")
    assert 3 <= stopped_at < 12 and checkpoint.resolve().name == f"step_{stopped_at:06d}"
    assert slurm.job(evaluation)["JobState"] == "PENDING"
    slurm.wait_until_completed(job)
    assert "goes back into the queue" in slurm.output(job)
    assert f"step_{stopped_at:06d}" in slurm.output(job).partition("resumed from")[2].partition("\n")[0]
    assert (runs.state("run"), runs.metrics("run")) == (runs.state("undisturbed"), runs.metrics("undisturbed"))
    slurm.wait_until_completed(evaluation)
    assert json.loads((out / "metrics.json").read_text())["total"] == 3


def test_a_mistake_ends_the_job_and_does_not_come_back(slurm, runs):
    job = slurm.submit(ROOT / "launch" / "train.sbatch", *runs.arguments("run", "optim.lrr=1"), options=["--nodes=2"])
    slurm.wait_for(lambda: slurm.job(job)["JobState"] == "FAILED")
    assert slurm.job(job)["ExitCode"] == "2:0"
    told = [line for line in slurm.output(job).splitlines() if line.startswith("train: ")]
    assert len(told) == 1 and "unknown key 'optim.lrr'; did you mean 'lr'?" in told[0]


def test_a_port_that_is_taken_is_passed_over(slurm, runs):
    options = ["--nodes=2", "--hold"]
    job = slurm.submit(ROOT / "launch" / "train.sbatch", *runs.arguments("run", "train.steps=1"), options=options)
    with socket.create_server(("127.0.0.1", 20000 + int(job) % 10000)):  # as launch/env.sh chooses
        slurm.ask("scontrol", "release", job)
        slurm.wait_until_completed(job, 240)
    assert runs.last_step("run") == 1


def test_a_cancelled_job_stays_cancelled(slurm, runs):
    script = str(runs.edited("import time; time.sleep(0.3)"))
    job = slurm.submit(ROOT / "launch" / "train.sbatch", *runs.arguments("run"), options=["--nodes=2"], SCRIPT=script)
    slurm.wait_for(lambda: runs.last_step("run") >= 2)
    slurm.ask("scancel", job)
    slurm.wait_for(lambda: slurm.job(job)["JobState"] == "CANCELLED")
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h").strip())
    assert slurm.job(job)["Restarts"] == "0"


def test_an_experiment_is_an_array_of_cells_that_comes_back_and_then_a_report(slurm, experiment_config, tmp_path):
    config = experiment_config(tmp_path)
    settings = ["train.steps=40"]
    array = slurm.submit(ROOT / "launch" / "experiment.sbatch", config, *settings, options=["--array=0-1"])
    cells = tmp_path / "tiny" / "cells"
    slurm.wait_for(lambda: list(cells.glob("model-none-*/run/metrics.jsonl")))
    slurm.ask("scancel", "--batch", "--signal=USR1", f"{array}_0")
    slurm.wait_for(lambda: len(list(cells.glob("*/scored.json"))) == 2, 180)
    assert "goes back into the queue" in "".join(path.read_text() for path in slurm.folder.glob("job-*.out"))
    babl = [Path(sys.executable).parent / "babl", "experiment"]
    for action in ("report", "verify"):
        assert subprocess.run([*babl, action, config, *settings]).returncode == 0
    assert (tmp_path / "tiny" / "report" / "report.html").exists()
