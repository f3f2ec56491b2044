"""The measures of a checkout are right on one small enough to measure by eye."""

import json

from babl.scripts.house import main


def test_a_small_checkout_is_measured(tmp_path, capsys):
    block = "\n".join(f"    x{i} = {i}" for i in range(9))
    files = {
        "babl/__init__.py": "",
        "babl/a.py": f"from babl import b\n\n\ndef first():\n{block}\n",
        "babl/b.py": f"def second():\n    import babl.a\n{block}\n",
        "babl/far.py": "import babl.b\n",
        "scripts/train.py": "from babl.a import first\n",
        "kernels/__init__.py": "",
        "tests/test_a.py": "pass\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert main([str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files and lines"]["babl"] == "4 files, 25 lines"
    assert found["longest functions"][0] == "11 babl/b.py:1 second"
    assert found["modules the loop reaches"] == 3 and found["lines the loop reaches"] == 25
    assert found["circles of modules"] == ["babl.a babl.b"]
    assert found["blocks of 8 lines in two places"] == 2  # a stretch of nine lines, in two places


def test_a_folder_without_babl_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no folder babl" in capsys.readouterr().err
