"""Data that a model writes: prompts from cards, answers that are kept as they come, checks, and a data set with its
provenance."""
