"""Log-probabilities of tokens in the formats of completions and of chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minitransformer.generation.logprobs import TokenLogprob
from minitransformer.text.tokenizers import Tokenizer


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token as text: its name if it is special, "bytes:…" where it is no UTF-8 by itself."""
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    piece = tokenizer.token_bytes(token)
    if token in names:
        return names[token]
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def completion_logprobs(
    tokenizer: Tokenizer, first: int | None, found: Sequence[TokenLogprob], offset: int
) -> tuple[dict[str, Any], int]:
    """Of a part of a completion, and the offset of the next part; `first` is the first token of an echoed prompt."""
    names = [token_text(tokenizer, each.token) for each in found]
    offsets = [offset]
    tokens = [] if first is None else [first]
    for token in [*tokens, *(each.token for each in found)]:
        special = token in tokenizer.special_tokens.values()
        offsets.append(offsets[-1] + (0 if special else len(tokenizer.decode([token]))))
    tops = [{token_text(tokenizer, token): value for token, value in reversed(each.likeliest)} for each in found]
    for each, name, top in zip(found, names, tops, strict=True):
        top[name] = each.logprob
    none: list[Any] = [None] * len(tokens)
    written = {
        "tokens": [*(token_text(tokenizer, token) for token in tokens), *names],
        "token_logprobs": [*none, *(each.logprob for each in found)],
        "top_logprobs": [*none, *tops],
        "text_offset": offsets[:-1],
    }
    return written, offsets[-1]


def chat_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Of an answer in a chat."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        piece = tokenizer.token_bytes(token)
        return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(piece)}

    content = [
        {**entry(each.token, each.logprob), "top_logprobs": [entry(*likely) for likely in each.likeliest]}
        for each in found
    ]
    return {"content": content}
