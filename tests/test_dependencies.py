"""What a bare install lacks is named by the verb that needs it, and every dependency has its reason."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from babl.errors import EXTRA_OF

ROOT = Path(__file__).parent.parent
BARE = """
import json, sys
for name in {modules}:
    sys.modules[name] = None  # an import of it fails as that of a package which is not there
from babl.cli import main
print(json.dumps([main(verb) for verb in {verbs}]))
"""


def declared():
    """Returns the pairs of package and extra in pyproject.toml, without [dev] and [all]."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    name = re.compile(r"[\w.-]+")
    return {(name.match(each)[0], extra) for extra in extras if extra not in ("dev", "all") for each in extras[extra]}


def test_the_table_of_dependencies_is_that_of_pyproject():
    rows = re.findall(
        r"^\| ([\w.-]+) \| ?([\w-]*) ?\| (.+) \|$", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE
    )
    assert {(package, extra) for package, extra, _ in rows if package != "Package"} == declared()


def test_a_verb_without_its_extra_says_what_to_install_and_the_others_run(tmp_path):
    (tmp_path / "data.json").write_text(
        json.dumps(
            {"data": [{"title": "t", "paragraphs": [{"context": "A b.", "qas": [
                {"id": "1", "question": "A?", "answers": [{"text": "b", "answer_start": 2}]}]}]}]}
        )
    )  # fmt: skip
    (tmp_path / "answers.json").write_text('{"1": "b"}')
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    data, answers = str(tmp_path / "data.json"), str(tmp_path / "answers.json")
    lacking = [
        (["serve", "--port", "0", "--data", str(tmp_path / "home")], "web"),
        (["feedback", "export", str(tmp_path / "out.json"), "--data", str(tmp_path / "home")], "web"),
        (["demo"], "experiment"),
        (["experiment", "run", "configs/experiments/none.toml"], "experiment"),
        (["overlap", data, data], "experiment"),
        (["score", str(tmp_path / "train.parquet"), answers], "data"),
    ]
    verbs = [verb for verb, _ in lacking] + [["score", data, answers], ["compare", data, answers, answers]]
    program = BARE.format(modules=sorted(EXTRA_OF), verbs=verbs)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert json.loads(done.stdout.splitlines()[-1]) == [2] * len(lacking) + [0, 0], done.stderr
    said = done.stderr.splitlines()
    for line, (verb, extra) in zip(said, lacking, strict=False):
        assert line.startswith(f"babl {verb[0]}: ") and line.endswith(f'not installed: pip install "babl[{extra}]"')
