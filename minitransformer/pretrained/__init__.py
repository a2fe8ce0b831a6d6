"""Import and export of public checkpoints."""

from minitransformer.pretrained.bert import BERTFamily, DistilBERTFamily, RoBERTaFamily
from minitransformer.pretrained.checkpoint import checkpoint_folder, generation_config, load, save
from minitransformer.pretrained.families import Family
from minitransformer.pretrained.gpt import BloomFamily, FalconFamily, GPT2Family, GPTJFamily, GPTNeoXFamily, OPTFamily
from minitransformer.pretrained.llama import (
    Gemma2Family,
    LlamaFamily,
    MistralFamily,
    MixtralFamily,
    OLMo2Family,
    Qwen2Family,
    Qwen3Family,
    StableLMFamily,
)
from minitransformer.pretrained.seq2seq import BARTFamily, MarianFamily, MT5Family, T5Family
from minitransformer.pretrained.tokenizers import PublicTokenizer

__all__ = [
    "BARTFamily",
    "BERTFamily",
    "BloomFamily",
    "DistilBERTFamily",
    "FalconFamily",
    "Family",
    "GPT2Family",
    "GPTJFamily",
    "GPTNeoXFamily",
    "Gemma2Family",
    "LlamaFamily",
    "MT5Family",
    "MarianFamily",
    "MistralFamily",
    "MixtralFamily",
    "OLMo2Family",
    "OPTFamily",
    "PublicTokenizer",
    "Qwen2Family",
    "Qwen3Family",
    "RoBERTaFamily",
    "StableLMFamily",
    "T5Family",
    "checkpoint_folder",
    "generation_config",
    "load",
    "save",
]
