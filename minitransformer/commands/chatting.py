"""The conversation of `sample --chat`, at a terminal, over a pipe, or about one message."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing, suppress

from minitransformer.errors import UserError
from minitransformer.generation.conversation import ChatFormat, Conversation
from minitransformer.runs import Run
from minitransformer.text.chat_template import SYSTEM, USER, Message

LEAVE = "Ctrl-D ends the conversation, Ctrl-C stops an answer"


def chat_format(run: Run, system: str | None) -> ChatFormat:
    """How conversations with `run` are written; raises `UserError` if it has no template that can write one."""
    template = run.chat_template
    if template is None:
        raise UserError(
            f"{run.path} has no chat template, because it was not trained on conversations: give --interactive, which "
            "continues each line on its own, or train it on some"
        )
    chat = ChatFormat(template, run.tokenizer)
    chat.encode([*system_messages(system), Message(USER, "?")])
    return chat


def system_messages(system: str | None) -> list[Message]:
    """What a conversation begins with."""
    return [] if system is None else [Message(SYSTEM, system)]


def hold_conversation(conversation: Conversation, messages: Sequence[str] | None) -> None:
    """Answer `messages`, or else each line of standard input until its end."""
    at_terminal = messages is None and sys.stdin.isatty() and sys.stdout.isatty()
    if messages is not None:
        for message in messages:
            _answer_message(conversation, message)
    elif at_terminal:
        _talk(conversation)
    else:
        for line in sys.stdin:
            if message := line.rstrip("\n"):
                _answer_message(conversation, message)


def _talk(conversation: Conversation) -> None:
    """Ask for messages until Ctrl-D, or Ctrl-C twice."""
    with suppress(ImportError):
        import readline  # noqa: F401  (importing it gives `input` editing and a history)
    print(LEAVE, file=sys.stderr)
    refused = False
    while True:
        try:
            message = input("> ")
        except (EOFError, KeyboardInterrupt) as end:
            print()
            if refused or isinstance(end, EOFError):
                return
            print(LEAVE, file=sys.stderr)
            refused = True
            continue
        refused = False
        if message.strip():
            with suppress(KeyboardInterrupt):
                _answer_aloud(conversation, message)


def _answer_aloud(conversation: Conversation, message: str) -> None:
    """`_answer_message` at a terminal: a mistake does not end the conversation."""
    try:
        _answer_message(conversation, message)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)


def _answer_message(conversation: Conversation, message: str) -> None:
    """Print the answer as it comes, and end its line, also where it is stopped."""
    last = ""
    with closing(conversation.answer(message)) as pieces:
        try:
            for piece in filter(None, pieces):
                print(piece, end="", flush=True)
                last = piece
        finally:
            if not last.endswith("\n"):
                print(flush=True)
