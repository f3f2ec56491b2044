"""Babl in the browser: chat, questions about passages, and an API, on one machine."""
