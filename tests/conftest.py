"""What several tests share: optional data, functions in processes of their own, and real runs of the loop."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():  # kernels are run by triton's interpreter then, as whoever imports triton first says
    os.environ["TRITON_INTERPRET"] = "1"

from babl.training.metrics import CLOCK_FIELDS

ROOT = Path(__file__).parent.parent
TINY = "model.shape={d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1, dropout_rate=0.2}"
STEP = "            step += 1\n"
# An older transformers; requests is what its huggingface_hub needs and ours does not.
OLD_PACKAGES = ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface_hub==0.36.0")
EXPERIMENT = """
[run]
name = "tiny"
dir = "{folder}"
[experiment]
arms = ["none", "gold"]
tests = ["none", "gold", "counterfactual"]
seeds = [0]
train_articles = 6
test_articles = 3
max_new_tokens = 3
bootstrap_samples = 100
[model]
shape = {{ d_model = 16, d_kv = 8, d_ff = 16, num_heads = 2, num_layers = 1, num_decoder_layers = 1 }}
tokenizer_size = 400
[data]
max_source_tokens = 128
stride = 16
[batch]
examples = 8
[train]
steps = 12
validate_every = 6
save_every = 1
keep_last = 1
preflight = false
"""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder of real data, tokenizers and checkpoints beside the project."""
    folder = Path(os.environ.get("BABL_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set BABL_SHARED)")
    return folder


@pytest.fixture(scope="session")
def splitmix64():
    """A function: the output of number `index` of splitmix64 seeded with `state`, in plain integers.

    Ref: Vigna's splitmix64.c.
    """

    def output(state, index):
        z = (state + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    return output


@pytest.fixture(scope="session")
def mask_by_hand(splitmix64):
    """A function: what one example's dropout keeps, 1 or 0, as nested lists of this shape; of 65,536, some drop."""

    def mask(key, site, shape, dropping):
        def under(state, shape):
            if len(shape) > 1:
                return [under(splitmix64(state, i), shape[1:]) for i in range(shape[0])]
            bits = [splitmix64(state, n // 4) >> 16 * (n % 4) & 0xFFFF for n in range(shape[0])]
            return [int((x ^ 0x8000) >= dropping) for x in bits]  # with the sign turned, two's complement is in order

        return under(splitmix64(key % 2**64, site), shape)

    return mask


@pytest.fixture(autouse=True)
def _denormals():
    """A training in this process flushes denormals, and leaves the processor so."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def run_distributed():
    """A function that calls `fn(world, *arguments)`, of a test file, in processes of their own, over gloo.

    It returns what each rank returned, by rank; where one fails, the others are ended, and its error is shown.
    """

    def run(fn, *arguments, world=2, timeout=150):
        with tempfile.TemporaryDirectory() as folder:
            torch.save(arguments, Path(folder) / "arguments.pt")
            worker = [sys.executable, str(ROOT / "tests/distributed/worker.py")]
            command = [*worker, inspect.getsourcefile(fn), fn.__name__, folder]
            ranks, logs = [], [Path(folder) / f"{rank}.log" for rank in range(world)]
            for rank, log in enumerate(logs):
                environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world)}
                if world > 1:  # as torchrun does
                    environment["LOCAL_RANK"] = str(rank)
                with log.open("w") as file:
                    ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
            try:
                deadline = time.monotonic() + timeout
                while any(process.poll() is None for process in ranks):
                    failed = [rank for rank, process in enumerate(ranks) if process.poll()]
                    assert not failed, f"rank {failed[0]}: {logs[failed[0]].read_text()}"
                    assert time.monotonic() < deadline, f"not done in {timeout} s: {logs[0].read_text()}"
                    time.sleep(0.05)
            finally:
                for process in ranks:
                    process.kill()
                    process.wait()
            failed = [rank for rank, process in enumerate(ranks) if process.returncode]
            assert not failed, f"rank {failed[0]}: {logs[failed[0]].read_text()}"
            return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return run


class Runs:
    """Starts, watches and ends runs of a tiny T5 on the embedded data; when the test ends, none is left."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, []

    def edited(self, code: str) -> Path:
        """Returns a copy of the loop that runs this code at the start of each step, as a researcher's might."""
        source = (ROOT / "scripts" / "train.py").read_text()
        assert source.count(STEP) == 1
        script = self.folder / "train.py"
        script.write_text(source.replace(STEP, STEP + "".join(f"            {line}\n" for line in code.splitlines())))
        return script

    def arguments(self, name, *overrides):
        """Returns what stands after the script on the command line."""
        settings = [f"run.dir={self.folder}", f"run.name={name}", TINY, "model.tokenizer_size=400", "batch.tokens=1500"]
        settings += ["train.validate_every=4", "train.save_every=4", "train.steps=12", *overrides]
        return [str(ROOT / "configs" / "debug_cpu.toml"), *settings]

    def start(
        self, name, *overrides, ranks=2, script=ROOT / "scripts" / "train.py", launcher="babl.distributed.launch"
    ):
        launch = ["-m", launcher, f"--nproc_per_node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launch, str(script), *self.arguments(name, *overrides)]
        process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def finish(self, process, seconds=90):
        """Returns exit code, output and the seconds it took."""
        begun = time.monotonic()
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output, time.monotonic() - begun

    def run(self, name, *overrides, **how):
        """The run has ended well; returns its output."""
        code, output, _ = self.finish(self.start(name, *overrides, **how))
        assert code == 0, output
        return output

    def ranks(self, process):
        return [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]

    def wait_for(self, condition, process, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def last_step(self, name):
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def metrics(self, name):
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCK_FIELDS} for line in lines]

    def state(self, name):
        """Returns the bytes of all weights and optimizer state that the run ended with."""
        return {
            path.name: path.read_bytes() for path in (self.folder / name / "checkpoints/latest").glob("*.safetensors")
        }

    def end(self):
        for process in self.started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.send_signal(signal.SIGKILL)
                process.kill()
                process.wait()


@pytest.fixture
def runs(tmp_path):
    these = Runs(tmp_path)
    yield these
    these.end()


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory):
    """Returns the folder of a run that nothing has disturbed, on two ranks with this backend and these settings."""
    these = Runs(tmp_path_factory.mktemp("undisturbed"))

    def folder(backend, *overrides):
        name = "-".join([backend, *overrides])
        if not (these.folder / name).exists():
            these.run(name, f"distributed.backend={backend}", *overrides)
        return these.folder / name

    yield folder
    these.end()


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run):
    """Returns state and metrics that such a run ends with."""

    def end(backend, *overrides):
        folder = undisturbed_run(backend, *overrides)
        runs = Runs(folder.parent)
        return runs.state(folder.name), runs.metrics(folder.name)

    return end


@pytest.fixture(scope="session")
def experiment_config():
    """A function that writes the configuration of a tiny experiment, which then lies in folder / "tiny"."""

    def write(folder):
        path = folder / "tiny.toml"
        path.write_text(EXPERIMENT.format(folder=folder), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def side_python():
    """A function: a Python with these packages before the tests' own; built once, and kept in the user's cache."""

    def side_python(name, *installs):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "babl-tests"
        folder = cache / name
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "whole").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                _build(folder, installs)
        return folder / "bin" / "python"

    return side_python


def _build(folder, installs):
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]  # these come after the folder's own packages
    (own / "of_the_tests.pth").write_text("\n".join(f"import site; site.addsitedir({path!r})" for path in here))
    for packages in installs:
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{folder.name} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    (folder / "whole").touch()


@pytest.fixture(scope="session")
def old_python(side_python):
    """A Python with transformers 4.57.6 and this one's torch."""
    return side_python("transformers-4.57.6", ["--no-deps", *OLD_PACKAGES], ["requests"])
