import json

import pytest

from babl.errors import UserError
from babl.training.metrics import MetricsLog


def line(step, **values):
    return (json.dumps({"step": step, **values}) + "\n").encode()


BEFORE = [line(1, loss=3.0), line(2, loss=2.0), line(3, loss=1.0), line(3, validation_loss=1.5), line(4, loss=0.5)]
DAMAGE = {
    "zeros": b"\0" * 4096 + b"\n",
    "zeros without an end": b"\0" * 100,
    "half a character": '{"step": 2, "ü'.encode()[:-1] + b"\n",
    "cut short": b'{"step": 4, "lo',
    "no object": b"17\n",
    "no step": b'{"loss": 1.0}\n',
    "a step that is text": b'{"step": "4"}\n',
    "empty": b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", [1, 5])
def test_damaged_lines_are_left_out_and_counted(tmp_path, damage, place):
    joined = b"".join([*BEFORE[:place], DAMAGE[damage], *BEFORE[place:]])
    whole = DAMAGE[damage].endswith(b"\n") or place == 5
    (tmp_path / "metrics.jsonl").write_bytes(joined)
    said = []
    MetricsLog(tmp_path, 3, False, said.append).close()
    kept = BEFORE[:3] if whole else [BEFORE[0], BEFORE[2]]  # what follows without an end of line is lost with it
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(kept)
    number = len(joined.split(b"\n")) - joined.endswith(b"\n")
    assert said == [f"{tmp_path / 'metrics.jsonl'}: 1 of {number} lines cannot be read, and are left out"]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(Is a directory\)"):
        MetricsLog(tmp_path, 0, False)


def test_a_missing_file_begins_anew(tmp_path):
    said = []
    MetricsLog(tmp_path, 0, False, said.append).close()
    assert said == [], "a run that begins has none"
    (tmp_path / "metrics.jsonl").unlink()
    log = MetricsLog(tmp_path, 7, False, said.append)
    log.write(8, loss=1.0)
    log.close()
    assert said == [f"{tmp_path / 'metrics.jsonl'} is missing: it begins with step 8"]
    assert [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [8]


def test_tensorboard_shows_no_step_twice(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path, 0, True, print)
    for step in range(1, 7):
        log.write(step, loss=float(step))
        if step in (3, 6):
            log.write(step, validation_loss=float(step))
    log.board.flush()  # killed: nothing is closed
    log.file.close()
    log = MetricsLog(tmp_path, 3, True, print)
    log.write(3, validation_loss=30.0)
    log.write(4, loss=40.0)
    log.close()
    shown = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [(e.step, e.value) for e in shown.Scalars("validation_loss")] == [(3, 30.0)]
