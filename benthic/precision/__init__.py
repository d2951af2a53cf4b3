"""Number formats: FP8 blocks of published checkpoints, and computing in bf16."""
