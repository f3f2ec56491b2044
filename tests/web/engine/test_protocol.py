import struct
import subprocess
import sys

import msgspec
import pytest

from babl.web.engine import protocol
from babl.web.engine.protocol import (
    BadFrame,
    ChatRequest,
    Delta,
    Done,
    Failed,
    Frames,
    FromEngine,
    Message,
    Reply,
    Settings,
    ToEngine,
    TokenCount,
    frame,
)

REQUEST = ChatRequest("1", "m", [Message("user", "née? 🦊")], Settings(stop=["x"]), None, "u")
EVENTS = [Delta("1", "é", 1), Done("1", "é", "eos", 2, -0.5, 0.6, (3, 4), 0.1, "w", "t"), Failed("2", "busy", "m", 1.5)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_messages_come_through_in_pieces_of_any_size(size):
    data = b"".join(map(frame, [*EVENTS, Reply("c", TokenCount(1, 2, 3, 4))]))
    frames, found = Frames(FromEngine), []
    for at in range(0, len(data), size):
        found += frames.feed(data[at : at + size])
    assert found == [*EVENTS, Reply("c", TokenCount(1, 2, 3, 4))]
    assert Frames(ToEngine).feed(frame(REQUEST)) == [REQUEST]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\xc1", "is not a message"),
        (b"", "is not a message"),
        (msgspec.msgpack.encode({"type": "nonsense"}), "is not a message"),
        (msgspec.msgpack.encode({"type": "chat", "id": 3, "model": "m", "messages": []}), "is not a message"),
        (b"\xdb\x00\x00\x00\x02\xff\xfe", "is not a message"),
    ],
)
def test_what_is_no_message_is_refused(body, message):
    with pytest.raises(ValueError, match=message):
        Frames(ToEngine).feed(struct.pack(">I", len(body)) + body)


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "chat", "id": "3"},
        {"type": "chat", "id": "3", "model": "m", "messages": [], "settings": {"temperature": "hot"}},
        {"type": "chat", "id": "3", "model": "m", "messages": [], "settings": {"temperature": float("nan")}},
        {"type": "no such type", "id": "3"},
    ],
)
def test_a_whole_frame_that_is_no_message_is_its_requests_alone(wrong):
    body = msgspec.msgpack.encode(wrong)
    before, bad, after = Frames(ToEngine).feed(frame(REQUEST) + struct.pack(">I", len(body)) + body + frame(REQUEST))
    assert (before, after) == (REQUEST, REQUEST) and isinstance(bad, BadFrame) and bad.id == "3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"temperature": -1.0}', "temperature is -1.0, expected 0 to 100"),
        ('{"temperature": 1e-9}', "temperature is 1e-09, expected 0, or at least 0.001"),
        ('{"temperature": "hot"}', "Expected `float`, got `str` - at `$.temperature`"),
        ('{"temperature": 1e999}', "Number out of range"),
        ('{"top_p": 1.5}', "top_p is 1.5, expected 1e-06 to 1"),
        ('{"max_new_tokens": 0}', "max_new_tokens is 0, expected 1 to 8192"),
        ('{"max_new_tokens": 8193}', "max_new_tokens is 8193, expected 1 to 8192"),
        ('{"seed": 100000000000000000000}', "seed is 100000000000000000000, expected 0 to 9223372036854775807"),
        ('{"seed": -1}', "seed is -1, expected 0 to"),
        ('{"seed": true}', "Expected `int`, got `bool`"),
        (f'{{"stop": {["x"] * 17}}}'.replace("'", '"'), "stop has 17 strings, expected at most 16"),
        ('{"stop": [""]}', "stop has a string of 0 characters, expected 1 to 1000"),
        ('{"unknown": 1}', "unknown field `unknown`"),
    ],
)
def test_settings_out_of_bounds_are_named(settings, message):
    with pytest.raises(msgspec.ValidationError) as error:
        msgspec.json.decode(settings, type=Settings)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="temperature is nan, expected"):
        Settings(temperature=float("nan"))


def test_what_cannot_be_encoded_is_no_frame():
    for wrong in (Delta("1", "\ud800", 1), TokenCount(2**64, 0, 0, 0)):
        with pytest.raises(ValueError, match="the message cannot be encoded"):
            frame(wrong)


def test_a_frame_has_a_longest_length(monkeypatch):
    with pytest.raises(ValueError, match="a frame of 4294967295 bytes, expected at most 16777216"):
        Frames(ToEngine).feed(b"\xff\xff\xff\xff")
    monkeypatch.setattr(protocol, "MAX_FRAME", 30)
    with pytest.raises(ValueError, match="expected at most 30"):
        frame(REQUEST)


def test_the_web_process_imports_neither_torch_nor_django():
    code = (
        "import sys, babl.web.engine.client, babl.web.engine.protocol, babl.web.engine.scripted\n"
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'django') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
