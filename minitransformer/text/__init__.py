"""From `--data` to batches of token ids; only `batches` imports torch."""
