"""What a training loop is made of."""

CONFIG, METRICS, CHECKPOINTS = "run.toml", "metrics.jsonl", "checkpoints"  # what a run's folder holds
