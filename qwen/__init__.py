"""Run the Qwen chat models: checkpoints, decoding, chat. Imports nothing heavy by itself."""

__version__ = "0.1.0"
