"""The program in which Jinja templates are rendered, as a process of its own, with limits on time and memory.

A template may come from a stranger. Jinja's sandbox keeps it from Python's internals; this process bounds what the
sandbox does not: `{{ 9 ** (9 ** 9) }}` neither ends nor can be interrupted from inside. It is run by its path, reads a
request from each line of standard input, and answers with a line of JSON: a text, or an error and its kind.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined, UndefinedError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2.0
"""of processor time for a rendering"""
MOST_MEMORY = 1 << 30
MOST_CHARACTERS = 4_000_000


class GenerationBlock(Extension):
    """`{% generation %}`, by which published templates mark what the assistant writes: its content, as it is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an attribute of instances)

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PublishedTemplates(ImmutableSandboxedEnvironment):
    """The environment that published chat templates are written for: that of transformers' `apply_chat_template`."""

    def __init__(self, undefined: type[Undefined]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=undefined,
            extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__} is out of bounds")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """JSON without the escapes of HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@lru_cache
def _environment(strict: bool) -> PublishedTemplates:
    return PublishedTemplates(StrictUndefined if strict else Undefined)


@lru_cache(maxsize=16)
def _compiled(source: str, strict: bool) -> Any:
    return _environment(strict).from_string(source)


def _rendered(request: dict[str, Any]) -> dict[str, str]:
    """The answer to a request: its text, or an error with the kind of mistake that it is."""
    try:
        parts, left = [], MOST_CHARACTERS
        for part in _compiled(request["source"], request["strict"]).generate(request["variables"]):
            parts.append(part)
            left -= len(part)
            if left < 0:
                return {"kind": "size", "error": f"it writes more than {MOST_CHARACTERS:,} characters"}
        return {"text": "".join(parts)}
    except TemplateSyntaxError as error:
        return {"kind": "syntax", "error": f"line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"kind": "security", "error": str(error)}
    except UndefinedError as error:
        return {"kind": "undefined", "error": str(error)}
    except TemplateError as error:
        return {"kind": "refusal", "error": str(error)}
    except MemoryError:
        return {"kind": "memory", "error": f"it takes more than {MOST_MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"kind": "mistake", "error": "it calls itself without end"}
    except Exception as error:  # a template may make any mistake that an expression of Python can
        return {"kind": "mistake", "error": f"{type(error).__name__}: {error}"}


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: float) -> None:
    """The system ends this process after so much processor time; 0 lifts the limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def serve() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_time(SECONDS)
        answer = _rendered(json.loads(line))
        _limit_time(0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
