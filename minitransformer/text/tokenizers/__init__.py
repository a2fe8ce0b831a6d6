"""Text to token ids and back: trained byte-level BPE, raw bytes, characters, and tiktoken's published encodings."""

from minitransformer.text.tokenizers.base import END_OF_TEXT, MASK, MASKS, Texts, Tokenizer, check_ids
from minitransformer.text.tokenizers.basic import Bytes, Characters
from minitransformer.text.tokenizers.bpe import BPE, GPT4_SPLIT
from minitransformer.text.tokenizers.framing import Framing
from minitransformer.text.tokenizers.published import CL100K, GPT2, O200K

__all__ = [
    "BPE",
    "CL100K",
    "END_OF_TEXT",
    "GPT2",
    "GPT4_SPLIT",
    "MASK",
    "MASKS",
    "O200K",
    "Bytes",
    "Characters",
    "Framing",
    "Texts",
    "Tokenizer",
    "check_ids",
]
