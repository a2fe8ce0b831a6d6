"""Chat templates: written as transformers writes them, kept inside their sandbox, with answers told from the rest."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.pretrained.tokenizers import load_tokenizer
from minitransformer.text.chat_template import ChatTemplate, Message
from minitransformer.text.templates import render_template
from minitransformer.text.tokenizers import BPE, Bytes, Tokenizer
from minitransformer.text.tokenizers.spelled import encode_with_special_tokens
from tests.tokenizers_for_tests import like_gpt2, like_llama2, like_llama3, like_qwen2, like_t5

transformers = pytest.importorskip("transformers")

CHATML = ChatTemplate.named("chatml")
BYTES = Bytes().with_special_tokens(CHATML.control_tokens)
TALK = [
    Message("system", "Be brief."),
    Message("user", "  What is 2 + 2? "),
    Message("assistant", "\n4 "),
    Message("user", "Größe, 東京 🦊?"),
    Message("assistant", "Yes"),
]
# As they are published, or shortened: Qwen 2, Llama 3, Zephyr, Mistral, Gemma.
PUBLISHED = {
    "chatml": CHATML.source,
    "qwen": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama 3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + "
    "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + "
    "message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + "
    "message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "mistral": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + "
    "message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}",
    "marked": "{%- for message in messages %}{{- message|tojson }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}</s>{% endgeneration %}{% continue %}{% endif %}\n{%- endfor %}",
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def template_called(name: str) -> ChatTemplate:
    return ChatTemplate(PUBLISHED[name], name, NAMES)


@pytest.fixture(scope="module")
def library_tokenizer() -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=like_qwen2())
    tokenizer.add_special_tokens(NAMES)
    return tokenizer


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [vars(message) for message in messages]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_template_writes_what_transformers_writes(
    name: str, count: int, prompt: bool, library_tokenizer: Any
) -> None:
    talk = TALK[:count]
    theirs = library_tokenizer.apply_chat_template(
        as_dicts(talk), chat_template=PUBLISHED[name], tokenize=False, add_generation_prompt=prompt
    )
    assert template_called(name).render(talk, add_generation_prompt=prompt) == theirs


# Not GPT-2 with Llama 3's template: "\n\n" is one token at the end of a prompt, and two before a word. Here it is one
# before earlier answers too, as in training.
@pytest.mark.parametrize(
    ("name", "make"),
    [
        (name, make)
        for name in ("qwen", "llama 3", "zephyr", "mistral")
        for make in (like_gpt2, like_llama3, like_qwen2, like_t5, like_llama2)
        if (name, make) != ("llama 3", like_gpt2)
    ],
)
def test_the_ids_of_a_conversation_are_those_of_transformers(
    name: str, make: Callable[[], Any], tmp_path: Path
) -> None:
    implementation = make()
    implementation.add_special_tokens(
        ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    )
    implementation.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**NAMES, "eos_token": "<|im_end|>"}))
    library_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=implementation, **NAMES)
    theirs = library_tokenizer.apply_chat_template(
        as_dicts(TALK[:4]), chat_template=PUBLISHED[name], add_generation_prompt=True
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    known = {token: implementation.token_to_id(token) for token in ("<|im_end|>", "</s>")}
    template = ChatTemplate(PUBLISHED[name], name, NAMES, known)
    assert template.encode_prompt(TALK[:4], tokenizer) == theirs["input_ids"]


OUTSIDE = {
    "{{ 9 ** (9 ** 9) }}": "more than 2 seconds",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "more than 2 seconds",
    "{{ 'x'.ljust(10 ** 10) }}": "more than 1024 MiB",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "more than 1024 MiB",
    "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}": "more than 4,000,000 characters",
    "{{ ''.__class__ }}": "'__class__' of a str is out of bounds",
    "{{ messages|attr('__class__') }}": "'__class__' of a list is out of bounds",
    "{{ cycler.__init__.__globals__.os }}": "'__init__' of a type is out of bounds",
    "{{ '{0.__class__}'.format(1) }}": "'__class__' of a int is out of bounds",
    "{{ messages.append(1) }}": "'append' of a list is out of bounds",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without end",
    "{% include 'secret' %}": "no loader",
    "{{ range(10 ** 7) }}": "Range too big",
    "{{ raise_exception('only one system message') }}": "only one system message",
    "{% if %}": "line 1: ",
    "{{ messages[9].content }}": "no element 9",
    "{{ 1 / 0 }}": "division by zero",
}


@pytest.mark.parametrize("source", OUTSIDE)
def test_a_template_that_leaves_its_sandbox_or_fails_is_one_sentence(source: str) -> None:
    with pytest.raises(UserError) as caught:
        ChatTemplate.from_jinja(source, "theirs.jinja")
    assert OUTSIDE[source] in str(caught.value)
    assert str(caught.value).startswith("the template theirs.jinja fails (")
    assert CHATML.render(TALK[:1]) == "<|im_start|>system\nBe brief.<|im_end|>\n", "the next template is rendered"


def test_an_unknown_built_in_template_is_refused() -> None:
    with pytest.raises(UserError, match="no chat template 'chatmml': choose chatml"):
        ChatTemplate.named("chatmml")


def test_a_template_goes_to_other_processes() -> None:
    assert CHATML.end_of_turn == "<|im_end|>"
    assert pickle.loads(pickle.dumps(CHATML)).render(TALK) == CHATML.render(TALK)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama 3", "<|eot_id|>"),
        ("zephyr", "</s>"),
        ("mistral", "</s>"),
        ("qwen", "<|im_end|>"),
    ],
)
def test_the_end_of_a_turn_is_found_in_the_template(name: str, end: str) -> None:
    assert template_called(name).end_of_turn == end


def test_a_template_without_an_end_of_turn_ends_an_answer_with_the_end_of_text() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "plain")
    ids, is_answer = template.answer_spans(TALK[1:3], BYTES)
    assert template.end_of_turn is None
    assert (ids[-1], is_answer[-1]) == (BYTES.end_of_text, True)


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("chatml", ["\n4 <|im_end|>", "Yes<|im_end|>"]),
        ("llama 3", ["4<|eot_id|>", "Yes<|eot_id|>"]),
        ("zephyr", ["\n4 </s>", "Yes</s>"]),
        ("mistral", [" 4</s>", " Yes</s>"]),
    ],
)
def test_an_answer_is_what_follows_its_prompt_with_the_end_of_its_turn(name: str, answers: list[str]) -> None:
    tokenizer = Bytes().with_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"])
    template = template_called(name)
    ids, is_answer = template.answer_spans(TALK, tokenizer)
    assert spelled(tokenizer, ids) == template.render(TALK)
    found = [template.encode_prompt(TALK[:2], tokenizer), template.encode_prompt(TALK[:4], tokenizer)]
    for prompt, answer in zip(found, answers, strict=True):
        own = encode_with_special_tokens(tokenizer, answer)
        begin, end = len(prompt), len(prompt) + len(own)
        if name == "zephyr":  # whose generation prompt lacks the line break of its answers
            begin -= 1
        assert ids[: len(prompt)] == prompt
        assert is_answer[len(prompt) : end] == [True] * len(own)
        assert ids[len(prompt) : end] == own or name == "zephyr"
    assert sum(is_answer) == sum(len(encode_with_special_tokens(tokenizer, answer)) for answer in answers)


TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("<|im_end|> \n\ufdd0"), max_size=12) | st.sampled_from(
    ["<|im_end|>", "a<|im_start|>system\n", "<|endoftext|>"]
)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.booleans())
def test_any_conversation_has_its_text_its_answers_and_its_prompts(talk: list[tuple[str, str]], trained: bool) -> None:
    tokenizer = WORDS if trained else BYTES
    messages = [Message(role, text) for pair in talk for role, text in zip(("user", "assistant"), pair, strict=True)]
    ids, is_answer = CHATML.answer_spans(messages, tokenizer)
    assert spelled(tokenizer, ids) == CHATML.render(messages)
    answers = spelled(tokenizer, [token for token, own in zip(ids, is_answer, strict=True) if own])
    assert answers == "".join(f"{answer}<|im_end|>" for _, answer in talk)
    # No message ends a turn: there are as many control tokens as the template writes.
    assert [ids.count(tokenizer.special_tokens[name]) for name in CHATML.control_tokens] == [len(messages)] * 2
    assert tokenizer.end_of_text not in ids
    for count in range(1, len(messages), 2):
        prompt = CHATML.encode_prompt(messages[:count], tokenizer)
        assert ids[: len(prompt)] == prompt
        assert is_answer[len(prompt)]
        assert not is_answer[len(prompt) - 1]


WORDS = BPE.train("the quick <|im_end|> brown fox\n\nassistant user im_start " * 9, 300).with_special_tokens(
    CHATML.control_tokens
)


def test_a_template_that_changes_an_answer_is_refused_for_training_and_still_writes_prompts() -> None:
    thoughts = "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    template = ChatTemplate(thoughts, "thinking")
    talk = [Message("user", "?"), Message("assistant", "<think>hm</think>4"), Message("user", "!")]
    with pytest.raises(UserError, match="does not write every answer as it is"):
        template.answer_spans(talk, BYTES)
    assert spelled(BYTES, template.encode_prompt(talk, BYTES)) == template.render(talk)


def test_special_tokens_in_a_prompt_are_the_tokens_and_the_longest_spelling_wins() -> None:
    tokenizer = Bytes().with_special_tokens(["<a>", "<a><b>"])
    found = encode_with_special_tokens(tokenizer, "x<a><b><a>y", {"y": 7})
    assert found == [ord("x"), tokenizer.special_tokens["<a><b>"], tokenizer.special_tokens["<a>"], 7]


def test_a_strict_template_names_the_missing_variable() -> None:
    assert render_template("{{ a }} {{ b.c }}", {"a": 1, "b": {"c": "x"}}, "f", strict=True) == "1 x"
    with pytest.raises(UserError, match="'question' is undefined"):
        render_template("{{ question }}", {"a": 1}, "f", strict=True)
