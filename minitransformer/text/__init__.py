"""From the user's `--data` to a batch of token ids; only `batches` imports torch."""
