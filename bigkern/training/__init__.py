"""Training, evaluation and prediction: data, the training loop, checkpoints, metrics, and their commands."""
