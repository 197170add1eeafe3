"""The training step: schedule, optimizer, evaluation and the trainer that puts them together."""
