"""Configs of checkpoints that others quantized: which linear has which layout, a file a format."""
