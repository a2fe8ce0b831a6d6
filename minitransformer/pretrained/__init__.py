"""Import and export of public checkpoints."""

from minitransformer.pretrained import (
    bert,
    cohere,
    dbrx,
    gemma,
    gguf_encoders,
    gguf_gemma,
    gguf_gpt,
    gguf_modernbert,
    gguf_subwords,
    gpt,
    llama,
    modernbert,
    seq2seq,
)
from minitransformer.pretrained.checkpoint import (
    checkpoint_files,
    checkpoint_folder,
    generation_config,
    load,
    save,
    write_public,
)
from minitransformer.pretrained.tokenizers import PublicTokenizer

__all__ = [
    "PublicTokenizer",
    "bert",
    "checkpoint_files",
    "checkpoint_folder",
    "cohere",
    "dbrx",
    "gemma",
    "generation_config",
    "gguf_encoders",
    "gguf_gemma",
    "gguf_gpt",
    "gguf_modernbert",
    "gguf_subwords",
    "gpt",
    "llama",
    "load",
    "modernbert",
    "save",
    "seq2seq",
    "write_public",
]
