import struct
import subprocess
import sys

import msgspec
import pytest

from babl.web.engine import protocol
from babl.web.engine.protocol import (
    ChatRequest,
    Counted,
    Delta,
    Done,
    Failed,
    Frames,
    FromEngine,
    Message,
    Reply,
    Settings,
    ToEngine,
    frame,
)

REQUEST = ChatRequest("1", "m", [Message("user", "née? 🦊")], Settings(stop=["x"]), None, "u")
EVENTS = [Delta("1", "é"), Done("1", "é", "eos", 2, -0.5, 0.6, (3, 4), 0.1, "w", "t"), Failed("2", "busy", "m", 1.5)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_messages_come_through_in_pieces_of_any_size(size):
    data = b"".join(map(frame, [*EVENTS, Reply("c", Counted(1, 2, 3, 4))]))
    frames, found = Frames(FromEngine), []
    for at in range(0, len(data), size):
        found += frames.feed(data[at : at + size])
    assert found == [*EVENTS, Reply("c", Counted(1, 2, 3, 4))]
    assert Frames(ToEngine).feed(frame(REQUEST)) == [REQUEST]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\xc1", "is not a message"),
        (b"", "is not a message"),
        (msgspec.msgpack.encode({"type": "nonsense"}), "is not a message"),
        (msgspec.msgpack.encode({"type": "chat", "id": 3, "model": "m", "messages": []}), "is not a message"),
        (msgspec.msgpack.encode({"type": "chat", "id": "3"}), "is not a message"),
        (b"\xdb\x00\x00\x00\x02\xff\xfe", "is not a message"),
    ],
)
def test_what_is_no_message_is_refused(body, message):
    with pytest.raises(ValueError, match=message):
        Frames(ToEngine).feed(struct.pack(">I", len(body)) + body)


def test_a_frame_has_a_longest_length(monkeypatch):
    with pytest.raises(ValueError, match="a frame of 4294967295 bytes, expected at most 16777216"):
        Frames(ToEngine).feed(b"\xff\xff\xff\xff")
    monkeypatch.setattr(protocol, "MOST_FRAME", 30)
    with pytest.raises(ValueError, match="expected at most 30"):
        frame(REQUEST)


def test_the_web_process_imports_neither_torch_nor_django():
    code = (
        "import sys, babl.web.engine.client, babl.web.engine.protocol, babl.web.engine.scripted\n"
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'django') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
