"""Programs, read top to bottom; installed as babl.scripts."""
