"""Which ends of a step put a job back into the queue, and how often: launch/requeue.sh, with a scontrol of the test."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
JOB = """\
set -euo pipefail
. {requeue}
{before}
bash -c '{step}' &
child=$!
{after}
wait_for "$child" 7_3
"""
BUSY = "while :; do sleep 0.02; done"


@pytest.fixture
def start(tmp_path):
    """A function that runs a job's script once; returns its exit code, stderr, and whether it was put back."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)

    def run(step, before="", after=""):
        script = JOB.format(requeue=ROOT / "launch" / "requeue.sh", step=step, before=before, after=after)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path}
        command = ["bash", "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20)
        asked = tmp_path / "asked"
        put_back = asked.exists() and asked.read_text() == "requeue 7_3\n"
        assert put_back or not asked.exists()
        asked.unlink(missing_ok=True)
        return done.returncode, done.stderr, put_back

    return run


@pytest.mark.parametrize("code", [0, 1, 2, 137, 143])
def test_a_step_that_ends_by_itself_ends_the_job_with_its_code(start, code):
    assert start(f"exit {code}") == (code, "", False)


def test_a_run_that_has_saved_comes_back(start):
    code, said, put_back = start("exit 75")
    assert (code, put_back) == (75, True) and "job 7_3 goes back into the queue" in said


def warned(start, code):
    """One start whose step leaves with this code, once it listens and the job is warned."""
    step = f'trap "exit {code}" USR1; touch listens; {BUSY}'
    warning = "{ until [ -e listens ]; do sleep 0.02; done; kill -USR1 $$; } &"
    return start(step, before="rm -f listens", after=warning)


def test_a_job_that_is_told_to_leave_before_it_has_saved_comes_back_twice_and_no_more(start, tmp_path):
    for _ in range(2):
        code, said, put_back = warned(start, 138)
        assert (code, put_back) == (138, True), said
    code, said, put_back = warned(start, 138)
    assert (code, put_back) == (1, False)
    assert said.splitlines()[-1] == (
        "launch: job 7_3 was told to leave 3 times in a row before it had saved a step; give it more time "
        "(sbatch --time, or a later --signal)"
    )
    assert not list(tmp_path.glob(".futile*"))


def test_a_step_saved_in_between_begins_the_count_anew(start):
    ends = [warned(start, code) for code in (138, 138, 75, 143, 138)]
    assert all(put_back for _, _, put_back in ends)


def test_a_warning_that_comes_before_the_step_reaches_it(start):
    step = f'trap "exit 75" USR1; {BUSY}'
    assert start(step, before="kill -USR1 $$", after="sleep 0.5")[0] == 75
