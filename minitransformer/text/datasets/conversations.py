"""Instruction data: conversations of which the answers are learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from minitransformer.errors import UserError
from minitransformer.settings import setting
from minitransformer.text.chat_template import ChatTemplate, is_template, usual_names
from minitransformer.text.conversations import ConversationCorpus, checked_names, open_conversations
from minitransformer.text.datasets.base import DataRequest, Dataset, Names
from minitransformer.text.datasets.conversation_preparation import ConversationPreparation, PreparedConversations
from minitransformer.text.templates import read_template
from minitransformer.text.tokenizers import Tokenizer


class Conversations(Dataset, name="conversations"):
    """Rows of .jsonl: messages with roles, a prompt and its completion, a source and its target, or a text.

    Each row may name a `group`: conversations of one group are all for training, or all for validation.
    """

    usual_data = "docs-qa"

    @dataclass(frozen=True)
    class Settings:
        chat_template: str | None = setting(
            None,
            flag="chat_template",
            changes_task=True,
            help="how conversations are written: chatml, or a file with a Jinja template; None is as the run of "
            "--init-from does, or else chatml",
        )
        template_variables: tuple[str, ...] = setting(
            (),
            flag="template_variables",
            changes_task=True,
            follows_data=True,
            help="special tokens that the chat template has as variables, such as eos_token=</s>; none is those of "
            "the run of --init-from, or of the tokenizer",
        )
        template_tokens: tuple[str, ...] = setting(
            (),
            flag="template_tokens",
            changes_task=True,
            follows_data=True,
            help="ids of special tokens that the chat template spells in another way than the tokenizer, such as "
            "</s>=2; none is those of the run of --init-from",
        )
        packing: bool = setting(
            True,
            flag="packing",
            changes_task=True,
            help="put several conversations into one sequence, of which none sees another; without it, each has a "
            "sequence of its own",
        )
        too_long: Literal["skip", "cut"] = setting(
            "cut",
            flag="too_long",
            changes_task=True,
            help="skip or truncate conversations that are longer than the context",
        )

        def __post_init__(self) -> None:
            checked_names(self.template_variables, self.template_tokens)

    settings: Settings

    def prepare(self, request: DataRequest) -> PreparedConversations:
        prepared: Any = self.preparation(request).run()
        return replace(prepared, template=self.template(prepared.tokenizer), packing=self.settings.packing)

    def preparation(self, request: DataRequest) -> ConversationPreparation:
        return ConversationPreparation(
            **request.for_preparation(self.corpus),
            special_tokens=request.special_tokens,
            make_template=self.template,
            too_long=self.settings.too_long,
        )

    def template(self, tokenizer: Tokenizer) -> ChatTemplate:
        """How conversations are written; raises `UserError` for a template that cannot write one."""
        settings = self.settings
        variables, tokens = checked_names(settings.template_variables, settings.template_tokens)
        source = settings.chat_template or "chatml"
        details: Any = {"variables": variables or usual_names(tokenizer), "special_tokens": tokens}
        if is_template(source):
            return ChatTemplate.from_jinja(source, "of the run", **details)
        return replace(ChatTemplate.named(source), **details)

    def with_contents(self) -> Settings:
        name = self.settings.chat_template
        if name is None or is_template(name) or name in ChatTemplate.built_in:
            return self.settings
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"there is no chat template {name!r}: choose {', '.join(ChatTemplate.built_in)}, or a file")
        return replace(self.settings, chat_template=read_template(path))

    def corpus(self, data: Names, field: str) -> ConversationCorpus:
        """The conversations that `data` names; raises `UserError` if there are none."""
        return open_conversations(data, field=field)
