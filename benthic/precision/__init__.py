"""Number formats: FP8 blocks of published checkpoints, and computing in FP8 and bf16."""
