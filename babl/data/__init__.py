"""Questions, what the model may see of them, and the batches they become."""
