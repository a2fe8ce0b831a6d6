"""llama.cpp in a process of its own: it aborts the process on a file that it did not expect."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.exporting.copies import CopyError
from minitransformer.processes import Process, processors

FloatArray = npt.NDArray[np.float32]
F32 = 0
"""the type of ggml for keys and values in full"""
AS_THE_FILE_SAYS, NO_POOLING = -1, 0


class LlamaError(Exception):
    """A call of llama.cpp that failed; what it said stands in its log."""


class LlamaModel:
    """A GGUF file in llama.cpp, by its own functions, with contexts of `length` tokens."""

    def __init__(self, path: str, length: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.length = length
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise LlamaError
        self.vocab = self.api.llama_model_get_vocab(self.model)
        self.writes = self.api.llama_model_has_decoder(self.model) and self._meta("attention.causal") != "false"
        self.is_two_sided = self.writes and self.api.llama_model_has_encoder(self.model)
        self.context: Callable[[int], Any] = cache(self._context)

    def _meta(self, key: str) -> str | None:
        """A value of the metadata, of the tokenizer or of the architecture."""
        buffer = ctypes.create_string_buffer(1 << 16)
        find = self.api.llama_model_meta_val_str
        if not key.startswith(("tokenizer.", "general.")):
            key = f"{self._meta('general.architecture')}.{key}"
        found = find(self.model, key.encode(), buffer, len(buffer)) >= 0
        return buffer.value.decode() if found else None

    def _context(self, pooling: int) -> Any:
        settings = self.api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self.length
        settings.n_threads = settings.n_threads_batch = max(1, processors() // 2)
        settings.flash_attn_type, settings.type_k, settings.type_v = 0, F32, F32
        settings.embeddings, settings.pooling_type = not self.writes, pooling
        context = self.api.llama_init_from_model(self.model, settings)
        if not context:
            raise LlamaError
        return context

    def _run(self, call: Any, context: Any, tokens: Sequence[int], begin: int = 0) -> None:
        """Encode or decode `tokens`, of which each gives an output, at the positions from `begin` on."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, begin + place, True
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        code = call(context, batch)
        self.api.llama_batch_free(batch)
        if code:
            raise LlamaError

    def _start(self, source: Sequence[int] | None, pooling: int = NO_POOLING) -> Any:
        """A context without a text, which has read the `source` of an encoder-decoder."""
        context = self.context(pooling)
        if self.writes:
            self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        if source is not None:
            self._run(self.api.llama_encode, context, source)
        return context

    def outputs(self, *inputs: Sequence[int]) -> FloatArray:
        """Logits of each token, or the hidden states of an encoder, [length, features]; of a source and a target."""
        *source, tokens = inputs
        if not self.writes:
            return self._states(tokens)
        context = self._start(source[0] if source else None)
        self._run(self.api.llama_decode, context, tokens)
        return _copied(self.api.llama_get_logits(context), len(tokens), self.vocab_size)

    def _states(self, tokens: Sequence[int]) -> FloatArray:
        context = self._start(tokens)
        width = self.api.llama_model_n_embd(self.model)
        return _copied(self.api.llama_get_embeddings(context), len(tokens), width)

    def pooled(self, tokens: Sequence[int], count: int | None = None) -> FloatArray:
        """What the file makes of a whole text, [count]: its embedding, by default of the width of the model."""
        context = self._start(tokens, AS_THE_FILE_SAYS)
        found = self.api.llama_get_embeddings_seq(context, 0)
        if not found:
            raise LlamaError
        return _copied(found, 1, count or self.api.llama_model_n_embd(self.model))[0]

    def greedy(self, prompt: Sequence[int], count: int, ends: Sequence[int]) -> list[int]:
        """The most likely tokens after a prompt, or for a source, up to one of `ends`: a token at a time."""
        context = self._start(prompt if self.is_two_sided else None)
        new = [self.api.llama_model_decoder_start_token(self.model)] if self.is_two_sided else list(prompt)
        tokens: list[int] = []
        position = 0
        while len(tokens) < count and not (tokens and tokens[-1] in ends):
            self._run(self.api.llama_decode, context, new, position)
            position += len(new)
            logits = _copied(self.api.llama_get_logits_ith(context, len(new) - 1), 1, self.vocab_size)
            new = [int(logits.argmax())]
            tokens += new
        return tokens

    @cached_property
    def vocab_size(self) -> int:
        return int(self.api.llama_vocab_n_tokens(self.vocab))

    def token_ids(self, text: str, add_special: bool = True) -> list[int]:
        """The ids of a text, special tokens spelled out among them."""
        written = text.encode()
        room = 2 * len(written) + 16
        ids = (ctypes.c_int32 * room)()
        count = self.api.llama_tokenize(self.vocab, written, len(written), ids, room, add_special, True)
        if count < 0:
            raise LlamaError
        return list(ids[:count])

    def chat(self, messages: list[Any]) -> tuple[str, list[int]] | None:
        """A conversation up to the next answer, as a text and as ids; None without a template."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        source = self.api.llama_model_chat_template(self.model, None)
        if source is None:
            return None
        names: dict[str, Any] = {f"{name}_token": self._spelled(name) for name in ("eos", "bos")}
        text = Jinja2ChatFormatter(source.decode(), **names)(messages=messages).prompt
        return text, self.token_ids(text, add_special=False)

    def _spelled(self, name: str) -> str:
        number = self._meta(f"tokenizer.ggml.{name}_token_id")
        return "" if number is None else self.api.llama_vocab_get_text(self.vocab, int(number)).decode()

    def ends(self) -> set[int]:
        """The ids at which it ends a text by itself."""
        return {number for number in range(self.vocab_size) if self.api.llama_vocab_is_eog(self.vocab, number)}


def _copied(pointer: Any, rows: int, columns: int) -> FloatArray:
    return np.ctypeslib.as_array(pointer, (rows * columns,)).reshape(rows, columns).copy()


def serve_llama(remote: Connection, log: str) -> None:
    """Answer (method, file, length, arguments) with what that method of a `LlamaModel` gives, or with a `LlamaError`.

    What llama.cpp prints goes to the file `log`, the last words of an assertion among it.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    opened = cache(LlamaModel)
    while True:
        method, path, length, arguments = remote.recv()
        try:
            answer = getattr(opened(path, length), method)(*arguments)
        except LlamaError as error:
            answer = error
        remote.send(answer)


class LlamaProcess:
    """A process in which llama.cpp opens files; it ends with this object."""

    def __init__(self, serve: Callable[[Connection, str], None] = serve_llama) -> None:
        self._folder = TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        self._process = Process(serve, str(self._log), environment={"GGML_NO_BACKTRACE": "1"})
        weakref.finalize(self, self._process.end)

    def ask(self, method: str, path: Path, length: int, *arguments: Any) -> Any:
        """What a method of `LlamaModel` gives; raises `CopyError` if it fails, or ends the process."""
        try:
            self._process.connection.send((method, str(path), length, arguments))
            answer = self._process.connection.recv()
        except (EOFError, OSError):
            reason = f"llama.cpp ended with this copy open: it {self._process.ending()}{self._said()}"
            raise CopyError(f"{reason}; the copy was removed: choose another --format") from None
        if isinstance(answer, LlamaError):
            reason = self._said().strip(" ()") or f"its {method} failed"
            raise CopyError(
                f"the copy cannot be opened by llama.cpp ({reason}): it was removed; choose another --format"
            )
        return answer

    def _said(self) -> str:
        """The last line of its log that says what is wrong."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.is_file() else []
        wrong = [line.strip() for line in lines if "ASSERT" in line or "error" in line.lower()]
        return f" ({wrong[-1].rpartition('/')[2]})" if wrong else ""
