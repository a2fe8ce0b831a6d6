"""Decoding that keeps to a JSON schema: of the tokens, only those remain that a valid text can go on with.

Willard and Louf 2023 (arXiv 2307.09702); the grammar is followed by llguidance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.generation.processors import NEVER, Processor
from minitransformer.text.tokenizers import Tokenizer

try:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
except ImportError:
    raise UserError(
        'answers by a JSON schema need llguidance, which is not installed: pip install -e ".[serve]"'
    ) from None

ANY_JSON = {"type": "object"}


class TokenBytes:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.end_of_text
        self.tokens = list(tokenizer.pieces)
        self.special_token_ids = [*tokenizer.special_tokens.values()]
        for name, token in tokenizer.special_tokens.items():
            self.tokens[token] = name.encode()

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"))


class JsonGrammar:
    """Makes the rule of a text from a JSON schema, for the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ends = list(tokenizer.ends)
        self._tokens = LLTokenizer(TokenizerWrapper(TokenBytes(tokenizer)), eos_token=self._ends)

    def rule(self, schema: dict[str, Any], prompt_length: int) -> JsonRule:
        """The rule of one text after a prompt; raises `UserError` for a schema that is none, or is not supported."""
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0]
            raise UserError(f"the JSON schema cannot be followed ({reason}): give another one")
        return JsonRule(matcher, prompt_length, self._ends)


class JsonRule(Processor):
    """Only tokens with which the text so far can become a value of the schema, or its end once it is one.

    Where the tokenizer has no token to go on with, the text ends, and `failure` says why.
    """

    looks_back = True

    def __init__(self, matcher: LLMatcher, prompt_length: int, ends: list[int]) -> None:
        self._matcher, self._read, self._ends = matcher, prompt_length, ends
        self.failure: str | None = None

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        [new] = tokens[:, self._read :].tolist()
        self._matcher.consume_tokens(new)
        self._read += len(new)
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(packed, count=logits.size(-1), bitorder="little").astype(bool)
        if not allowed.any():
            reason = self._matcher.get_error() or "the tokenizer has no token for what must follow"
            self.failure = reason.strip().splitlines()[0]
            allowed[self._ends] = True
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), NEVER)
