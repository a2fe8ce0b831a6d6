"""Import and export of public checkpoints."""

from minitransformer.pretrained import bert, cohere, dbrx, gemma, gpt, llama, modernbert, seq2seq
from minitransformer.pretrained.checkpoint import checkpoint_folder, generation_config, load, save
from minitransformer.pretrained.tokenizers import PublicTokenizer

__all__ = [
    "PublicTokenizer",
    "bert",
    "checkpoint_folder",
    "cohere",
    "dbrx",
    "gemma",
    "generation_config",
    "gpt",
    "llama",
    "load",
    "modernbert",
    "save",
    "seq2seq",
]
