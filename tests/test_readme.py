"""The commands of the README and of the site's first journey do what they say."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/fine-tune.md"])
def test_the_commands_marked_as_tested_run(page, tmp_path):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- tested:.*?-->\n```sh\n(.*?)```", text, flags=re.DOTALL)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in "".join(blocks).splitlines():
        result = subprocess.run(shlex.split(line), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stderr[-2000:]}"
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_every_file_and_folder_it_names_is_there():
    named = re.findall(
        r"`((?:babl|scripts|kernels|configs|launch|tests|docs)(?:/[\w./-]+)?)`|\]\(((?:docs|launch)/[^)]+)\)", README
    )
    missing = [name for pair in named for name in pair if name and not (ROOT / name).exists()]
    assert not missing


def test_it_is_short():
    assert len(README.splitlines()) <= 110
