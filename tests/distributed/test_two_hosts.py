"""Two hosts and the switch between them, each a network namespace: real launchers meet, lose each other, and go on.

What a run ends with is compared, byte by byte, with two ranks on one machine that nothing has disturbed.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from babl.distributed.failure import EXIT_PREEMPTED

pytestmark = pytest.mark.hosts

FIRST = "10.77.0.1"
SLOW_STEP = "import time; time.sleep(0.4)"
SILENT = "another rank has not answered in time"


class Hosts:
    """Two hosts, one cable each to a switch; no traffic leaves them, and their names carry this process's id."""

    def __init__(self, runs):
        self.runs, self.script = runs, runs.edited(SLOW_STEP)
        self.names = [f"babl{os.getpid()}-{name}" for name in ("one", "two", "switch")]

    def ip(self, *arguments):
        subprocess.run(["ip", *arguments], check=True)

    def build(self):
        switch = self.names[2]
        for name in self.names:
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        self.ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        self.ip("-n", switch, "link", "set", "bridge", "up")
        for number, host in enumerate(self.names[:2], start=1):
            cable = ("type", "veth", "peer", "name", "eth0", "netns", host)
            self.ip("-n", switch, "link", "add", f"port{number}", *cable)
            self.ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
            self.ip("-n", host, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            self.ip("-n", host, "link", "set", "eth0", "up")

    def unplug(self):
        """The second host hears nothing any more, and is not told that its cable is out, as behind a dead switch."""
        self.ip("-n", self.names[2], "link", "set", "port2", "nomaster")

    def plug(self):
        self.ip("-n", self.names[2], "link", "set", "port2", "master", "bridge")

    def processes(self):
        """Returns the ids of what runs on the hosts."""
        found = []
        for name in self.names[:2]:
            found += subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found]

    def end(self):
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)

    def start(self, host, *command):
        """Returns a process on this host, 0 or 1, whose output can be read."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *map(str, command)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.runs.started.append(process)
        return process

    def launch(self, host, name, *overrides, port=20077, join_timeout=900):
        """One host's part of a run, started as launch/train.sbatch does."""
        launch = ["-m", "babl.distributed.launch", f"--node_rank={host}", "--nnodes=2", "--nproc_per_node=1"]
        launch += [f"--master_addr={FIRST}", f"--master_port={port}", f"--join_timeout={join_timeout}"]
        settings = self.runs.arguments(name, "run.resume=true", *overrides)
        return self.start(host, sys.executable, *launch, self.script, *settings)

    def launch_both(self, name, *overrides):
        return [self.launch(host, name, *overrides) for host in (0, 1)]

    def finish(self, processes, seconds=180):
        """Returns each process's exit code, and its output."""
        ends = [self.runs.finish(process, seconds) for process in processes]
        return [code for code, _, _ in ends], [output for _, output, _ in ends]


@pytest.fixture
def hosts(runs):
    if not shutil.which("ip"):
        pytest.skip("no ip here (Debian: apt-get install iproute2)")
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    these = Hosts(runs)
    try:
        these.build()
        yield these
    finally:
        these.end()


def told(output):
    """Returns what the programs themselves have said of their end."""
    return [line for line in output.splitlines() if line.startswith(("train: ", "launch: "))]


def assert_as_undisturbed(runs, name, undisturbed):
    assert (runs.state(name), runs.metrics(name)) == undisturbed("ddp")


def test_hosts_that_start_135_s_apart_train_together(hosts, runs, undisturbed):
    early = hosts.launch(0, "second-late"), hosts.launch(1, "first-late", port=20078)
    time.sleep(135)
    late = hosts.launch(1, "second-late"), hosts.launch(0, "first-late", port=20078)
    codes, outputs = hosts.finish([*early, *late])
    assert codes == [0, 0, 0, 0], outputs
    for name in ("second-late", "first-late"):
        assert_as_undisturbed(runs, name, undisturbed)


def test_a_port_that_is_taken_is_named_in_a_line(hosts):
    listen = "import socket, time; s = socket.create_server(('', 20077)); print('listens', flush=True); time.sleep(600)"
    other = hosts.start(0, sys.executable, "-c", listen)
    assert other.stdout.readline() == "listens\n"
    codes, outputs = hosts.finish([hosts.launch(host, "run", join_timeout=20) for host in (0, 1)])
    other.kill()
    assert codes == [2, 1], outputs
    line = "the port is taken on this machine; choose another (--master_port; port in launch/env.sh)"
    assert outputs[0].splitlines() == [f"launch: {FIRST}:20077: {line}"]
    assert told(outputs[1]) == [f"launch: 2 machines have not met at {FIRST}:20077 within 20 s (--join_timeout)"]
    assert not any("Traceback" in output or "frame #" in output for output in outputs)


def test_a_link_that_is_cut_for_5_s_disturbs_nothing(hosts, runs, undisturbed):
    processes = hosts.launch_both("run")
    runs.wait_for(lambda: runs.last_step("run") >= 3, processes[0], 120)
    hosts.unplug()
    time.sleep(5)
    seen = runs.last_step("run")
    hosts.plug()
    codes, outputs = hosts.finish(processes)
    assert codes == [0, 0], outputs
    assert seen < 12
    assert_as_undisturbed(runs, "run", undisturbed)


@pytest.mark.parametrize("backend", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_link_that_is_cut_for_good_ends_the_run_within_its_bound_and_it_goes_on(hosts, runs, undisturbed, backend):
    settings = ["distributed.timeout_seconds=20", f"distributed.backend={backend}"]
    processes = hosts.launch_both("run", *settings)
    runs.wait_for(lambda: runs.last_step("run") >= 6, processes[0], 180)
    hosts.unplug()
    codes, outputs = hosts.finish(processes, 120)  # 20 s, and as long as a busy machine takes to end processes
    assert codes == [1, 1], outputs
    for rank, output in enumerate(outputs):
        (line,) = told(output)
        assert line.startswith(f"train: rank {rank}: {SILENT}") and "distributed.timeout_seconds" in line
        assert "Traceback" not in output and "frame #" not in output
    assert 6 <= runs.last_step("run") < 12
    hosts.plug()
    codes, outputs = hosts.finish(hosts.launch_both("run", *settings))
    assert codes == [0, 0] and "resumed from" in outputs[0], outputs
    assert (runs.state("run"), runs.metrics("run")) == undisturbed(backend)


def test_a_host_whose_launcher_or_rank_is_killed_or_warned_takes_the_other_along(hosts, runs, undisturbed):
    """Two runs, each disturbed twice: both hosts end, nothing is left running, and it goes on from its checkpoint."""

    def disturbed(name, disturb):
        begun = runs.last_step(name)
        processes = hosts.launch_both(name, "train.save_every=1")
        runs.wait_for(lambda: runs.last_step(name) > begun, processes[0], 120)
        disturb(processes)
        codes, outputs = hosts.finish(processes)
        deadline = time.monotonic() + 60
        while hosts.processes():
            assert time.monotonic() < deadline, "an orphan is left"
            time.sleep(0.1)
        return codes, outputs

    codes, outputs = disturbed("ranks", lambda both: both[1].send_signal(signal.SIGUSR1))
    assert codes == [EXIT_PREEMPTED, EXIT_PREEMPTED], outputs

    codes, outputs = disturbed("ranks", lambda both: runs.ranks(both[1])[0].kill())
    assert codes == [1, 1], outputs
    assert "launch: rank 1 was killed by SIGKILL" in told(outputs[1])
    assert told(outputs[0])[0].startswith("train: rank 0: another rank is gone (")

    codes, outputs = disturbed("launchers", lambda both: both[1].kill())
    assert codes == [EXIT_PREEMPTED, -signal.SIGKILL], outputs

    codes, outputs = disturbed("launchers", lambda both: both[0].kill())
    assert codes == [-signal.SIGKILL, EXIT_PREEMPTED], outputs

    for name in ("ranks", "launchers"):
        codes, outputs = hosts.finish(hosts.launch_both(name, "train.save_every=4"))
        assert codes == [0, 0], outputs
        assert_as_undisturbed(runs, name, undisturbed)
