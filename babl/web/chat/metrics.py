"""The metrics that /metrics exports."""

from prometheus_client import Counter, Gauge, Histogram

ANSWERS = Counter("babl_answers", "Answers that have ended.", ["status"])
TOKENS = Counter("babl_answer_tokens", "Tokens written.")
UNSAVED = Counter("babl_failed_saves", "Times that answers could not be stored at once.")
FIRST_TEXT = Histogram(
    "babl_first_text_seconds",
    "From a question to the first text of its answer.",
    buckets=(0.05, 0.1, 0.3, 1, 3, 10, 30),
)
STREAMS = Gauge("babl_streams", "Streams of server-sent events that are open.")
