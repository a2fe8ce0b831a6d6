"""Tokenizers: trained byte-level BPE, raw bytes, characters, and tiktoken's published encodings."""

from minitransformer.text.tokenizers.base import END_OF_TEXT, MASK, MASKS, Texts, Tokenizer, check_ids
from minitransformer.text.tokenizers.basic import Bytes, Characters
from minitransformer.text.tokenizers.bpe import BPE, GPT2_SPLIT, GPT4_SPLIT
from minitransformer.text.tokenizers.framing import Framing
from minitransformer.text.tokenizers.published import CL100KEncoding, GPT2Encoding, O200KEncoding, TiktokenEncoding

__all__ = [
    "BPE",
    "END_OF_TEXT",
    "GPT2_SPLIT",
    "GPT4_SPLIT",
    "MASK",
    "MASKS",
    "Bytes",
    "CL100KEncoding",
    "Characters",
    "Framing",
    "GPT2Encoding",
    "O200KEncoding",
    "Texts",
    "TiktokenEncoding",
    "Tokenizer",
    "check_ids",
]
