"""The chat templates of runs: their own, or those that were published with an imported checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.pretrained.originals import CHAT, FOLDER
from minitransformer.pretrained.tokenizers import CONFIGS, NAMES, SETTINGS, merged_fields, tokenizer_content
from minitransformer.text.chat_template import ChatTemplate, usual_names
from minitransformer.text.templates import read_template
from minitransformer.text.tokenizers import Tokenizer


def chat_template_in(run: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of the run folder `run`; None if it has none. Raises `UserError` for a damaged one."""
    originals = run / FOLDER
    if (run / CHAT).is_file():
        source, path = read_template(run / CHAT), run / CHAT
    elif (originals / CHAT).is_file():
        source, path = read_template(originals / CHAT), originals / CHAT
    else:
        path = originals / SETTINGS
        found = _default_template(merged_fields(originals, (NAMES, SETTINGS)).get("chat_template"), path)
        if found is None:
            return None
        source = found
    return ChatTemplate(
        source, str(path), published_names(run) or usual_names(tokenizer), published_special_tokens(run)
    )


def published_names(run: Path) -> dict[str, str]:
    """The special tokens that an imported tokenizer gives its template as variables; empty for other runs."""
    published = merged_fields(run / FOLDER, (NAMES, SETTINGS))
    names = {name: _spelling(value) for name, value in published.items() if name.endswith("_token")}
    return {name: spelling for name, spelling in names.items() if spelling}


def published_special_tokens(run: Path) -> dict[str, int]:
    """The ids of special tokens by the names that an imported tokenizer has for them; empty for other runs.

    Here the end of a text is always called <|endoftext|>, which may be another's name.
    """
    originals = run / FOLDER
    if not originals.is_dir():
        return {}
    config = merged_fields(originals, CONFIGS)
    content = tokenizer_content(originals, merged_fields(originals, (NAMES, SETTINGS)), config.get("model_type", ""))
    added = [] if content is None else content.get("added_tokens", [])
    return {token["content"]: token["id"] for token in added if token.get("special")}


def _default_template(value: Any, path: Path) -> str | None:
    """The template in tokenizer_config.json: a text, or the one called "default" of several."""
    if isinstance(value, list):
        value = next((each.get("template") for each in value if each.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path} has a chat_template that is no text: give the run a {CHAT}")
    return value


def _spelling(value: Any) -> str:
    """A special token as older and newer files write it: its text, or an object with it."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""
