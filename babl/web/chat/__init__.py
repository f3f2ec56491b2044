"""Conversations, passages, answers and what people say about them: the one Django app."""
