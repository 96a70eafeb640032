"""Training of the bundled miniature Qwen3-Next; see ../train_tiny.py."""
