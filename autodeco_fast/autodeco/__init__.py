"""Checkpoints of the original AutoDeco system: their layout, configuration and model."""
