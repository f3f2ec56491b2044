"""The Django app: conversations, passages, answers and feedback."""
