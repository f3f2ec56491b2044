"""The process that owns the models, and the line to it; nothing here knows Django."""
