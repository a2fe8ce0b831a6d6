"""Tiny Shakespeare: one megabyte of his plays, on which char-rnn (2015) and nanoGPT report their losses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

from minitransformer.errors import UserError
from minitransformer.text.folders import work_folder

DESCRIPTION = "Tiny Shakespeare, 1.1 MB of plays"
ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def version() -> str:
    return SHA256


def documents() -> Iterator[str]:
    """The one text, from MINITRANSFORMER_SHAKESPEARE, the work folder, or the network; always the same bytes."""
    content, source = fetch()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{source} is not Tiny Shakespeare (its sha256 is not {SHA256}): replace it with {ADDRESS}")
    yield content.decode()


def fetch() -> tuple[bytes, str]:
    """The bytes, and where they are from."""
    named = os.environ.get("MINITRANSFORMER_SHAKESPEARE")
    local = Path(named) if named else work_folder() / "shakespeare" / "input.txt"
    try:
        if named or local.exists():
            return local.read_bytes(), str(local)
        with urlopen(ADDRESS, timeout=30) as answer:
            return answer.read(), ADDRESS
    except OSError as error:
        raise UserError(
            f"Tiny Shakespeare cannot be read from {local if named else ADDRESS} ({error}): download {ADDRESS} on a "
            f"connected machine and save it as {work_folder() / 'shakespeare' / 'input.txt'}, or set "
            "MINITRANSFORMER_SHAKESPEARE to the file"
        ) from None
