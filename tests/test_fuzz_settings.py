"""Any value for any setting of any variant is taken or refused in one sentence, in files and on the command line."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from hypothesis import strategies as st

from minitransformer.commands.sampling_flags import sampling_groups
from minitransformer.commands.settings_flags import parse_groups
from minitransformer.commands.train import Options, parse_run
from minitransformer.generation.config import SamplingConfig
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import count_parameters
from minitransformer.settings import all_declared, is_part, to_json, with_settings
from minitransformer.training.config import FORMAT, RunConfig
from minitransformer.training.ranks import ONE_PROCESS
from tests.fuzz_for_tests import any_texts, cases, for_cases, json_values, sentence_of
from tests.runs_for_tests import chosen_for

DECLARED = [each for each in all_declared(RunConfig) if not is_part(each)]
NAMES = sorted({each.name for each in DECLARED})
PLACES = st.sampled_from([("model",), ("data",), ("training",), ("format",), ()])


def record_with(name: str, value: Any) -> dict[str, Any]:
    """The configuration of a run in which the setting `name` of whatever variant has `value`."""
    record = to_json(with_settings(RunConfig(), chosen_for(RunConfig, name)))
    [each, *_] = [each for each in DECLARED if each.name == name]

    def put(part: Any) -> bool:
        if not isinstance(part, dict):
            return False
        if each.attribute in part and (each.variant is None or part.get("name") == each.variant.name):
            part[each.attribute] = value
            return True
        return any(put(inner) for inner in part.values())

    assert put(record), name
    return {"format": FORMAT, **record}


def read(record: dict[str, Any]) -> None:
    """A configuration that is taken is a model that can be counted, and can be written and read again."""
    config = RunConfig.from_json(record, "config.json")
    written = json.loads(json.dumps(config.to_json()))
    assert RunConfig.from_json(written, "config.json") == config


@cases(60, 4000)
def test_any_json_value_of_a_setting_is_taken_or_refused(count: int) -> None:
    def check(name: str, value: Any) -> None:
        sentence_of(lambda: read(record_with(name, value)))

    for_cases(count, check, st.sampled_from(NAMES), json_values)


@cases(20, 600)
def test_any_json_object_in_place_of_a_part_is_taken_or_refused(count: int) -> None:
    def check(part: str, value: Any) -> None:
        sentence_of(lambda: read({"format": FORMAT, **to_json(RunConfig()), part: value}))

    parts = st.sampled_from(["model", "data", "training", "format", "plugins"])
    names = st.sampled_from([*NAMES, "name", "residual", "optimizer", "tokenizer"])
    objects = st.dictionaries(names, json_values, max_size=4)
    for_cases(count, check, parts, json_values | objects | st.dictionaries(names, objects, max_size=2))


@cases(20, 150)
def test_a_model_of_any_sizes_is_counted_or_refused(count: int) -> None:
    sizes = ["d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size", "context_length"]
    known = {each.name for each in DECLARED}
    values = st.sampled_from([0, -1, 1, 2, 3, 4, 7, 8, 64, 100, 1 << 20, 10**9, 1 << 62])

    def check(changes: dict[str, Any]) -> None:
        sentence_of(lambda: count_parameters(with_settings(ModelConfig(vocab_size=300), changes)))

    for_cases(count, check, st.dictionaries(st.sampled_from([name for name in sizes if name in known]), values))


words = st.one_of(
    any_texts,
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "-1", "0", "1", "1e400", "nan", "inf", "None", "True", "--", "-", "0x10", "1_000", "٣", "½"]),
)


def answer(parse: Any, arguments: list[str]) -> None:
    """`arguments` are parsed, refused in one sentence, or said to be of another type, with exit code 2."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        code = 2
        try:
            sentence_of(lambda: parse(arguments))
        except SystemExit as ended:
            code = ended.code
    assert code == 2


def flags_of(names: list[str]) -> st.SearchStrategy[list[str]]:
    flags = st.sampled_from(names).map(lambda name: "--" + name.replace("_", "-")) | any_texts.map("--{}".format)
    pairs = st.tuples(flags, st.lists(words, max_size=2))
    return st.lists(pairs, min_size=1, max_size=3).map(
        lambda found: [w for flag, values in found for w in (flag, *values)]
    )


@cases(10, 500)
def test_any_flags_of_train_are_taken_or_refused(count: int) -> None:
    def check(arguments: list[str]) -> None:
        answer(lambda words: parse_run(Options, words, RunConfig(), ONE_PROCESS, prog="train.py"), arguments)

    for_cases(count, check, flags_of([*NAMES, "out", "resume", "checkpoint", "init_from"]))


@cases(10, 300)
def test_any_flags_of_sample_are_taken_or_refused(count: int) -> None:
    from minitransformer.commands.sample import Options as SampleOptions

    groups = sampling_groups()

    def check(arguments: list[str]) -> None:
        def parse(words: list[str]) -> None:
            _, given = parse_groups(SampleOptions, words, groups, SamplingConfig().flat, prog="sample.py")
            SamplingConfig(**given)

        answer(parse, arguments)

    for_cases(count, check, flags_of([each.name for group in groups for each in group.settings]))
