"""The process that owns the models, and the client that talks to it; nothing here imports Django."""
