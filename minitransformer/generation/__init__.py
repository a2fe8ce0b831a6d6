"""From a model to text: the engine, sampling, beam search, speculative decoding, and streaming."""
