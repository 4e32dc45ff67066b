"""Checkpoints of DeepMind and of transformers' built-in Perceiver -> this package's safetensors."""
