"""Time, memory and error of the released architectures: `python -m hf_perceiver.benchmark --help`."""
