"""`train.py --init-from` a public checkpoint: it is imported beside the run, and learns from where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import doctor, train
from minitransformer.runs import Run
from minitransformer.text.batches import IGNORE
from minitransformer.training.loader import Loader
from tests.runs_for_tests import metrics, refused
from tests.sentences_for_tests import write_sentence_folder
from tests.tokenizers_for_tests import like_bert, like_gpt2, like_t5

library = pytest.importorskip("transformers", reason="the reference implementation is not installed")
GPT2 = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BERT = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
MEMBERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", like_gpt2, GPT2),
    "llama": ("LlamaForCausalLM", like_gpt2, LLAMA),
    "bert": ("BertForMaskedLM", like_bert, BERT),
    "t5": ("T5ForConditionalGeneration", like_t5, T5),
}
TEXT = ["--data", "my.txt"]
FLAGS = ["--steps", "1", "--warmup-steps", "0", "--device", "cpu", "--precision", "fp32"]


def public(name: str) -> Any:
    """A random model of transformers, which it has saved in a folder called `name`."""
    architecture, make, sizes = MEMBERS[name]
    kind, tokenizer = getattr(library, architecture), make()
    ends = {} if make is like_bert else {"bos_token_id": 0, "eos_token_id": 1 if make is like_t5 else 0}
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=tokenizer.get_vocab_size(), **ends, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # for losses that are far from those of a uniform guess
    model.save_pretrained(name)
    tokenizer.save(f"{name}/tokenizer.json")
    return model


def loss_of_reference(model: Any, batch: Any) -> float:
    """The library's own loss on a training batch of ours."""
    labels = batch.targets.masked_fill(batch.targets == IGNORE, -100)
    if hasattr(batch, "source"):
        return float(model(batch.source, attention_mask=batch.source_is_token, labels=labels).loss)
    if hasattr(batch, "is_token"):
        return float(model(batch.inputs, labels=labels).loss)
    windows = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)  # it shifts labels by itself
    return float(model(windows, labels=windows).loss)


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("name", MEMBERS)
def test_the_first_loss_of_a_fine_tune_is_that_of_transformers(name: str, here: Path) -> None:
    theirs = public(name)
    (here / "my.tsv").write_text("".join(f"the fox {number}\tjumps over {number} dogs\n" for number in range(99)))
    data = ["--data", "my.tsv"] if name == "t5" else [*TEXT, "--sequence-length", "24"]
    assert train.main(["--init-from", name, *FLAGS, *data, "--log-every", "1", "--out", "tuned"]) == 0
    run = Run.open(here / "tuned")
    [batch] = Loader.of_run(run.config, run.config.prepare(run.tokenizers)).training_batches(0)
    [first] = [record for record in metrics(here / "tuned") if record.get("step") == 1 and "loss" in record]
    with torch.inference_mode():
        assert first["loss"] == pytest.approx(loss_of_reference(theirs, batch), rel=2e-6)


@pytest.mark.unchecked_shapes
def test_an_import_stands_beside_the_run_and_serves_the_next_one(here: Path, capsys: Any) -> None:
    public("gpt2")
    assert train.main(["--init-from", "gpt2", *TEXT, *FLAGS]) == 0
    out = capsys.readouterr().out.splitlines()
    [imported] = [path for path in (here / "runs").iterdir() if path.name != "gpt2-my"]
    assert out[0] == "imported   gpt2"
    assert out[1].startswith(f"from       runs/{imported.name} (decoder of ")
    assert Run.open(here / "runs/gpt2-my").parent.path == f"runs/{imported.name}"  # type: ignore[union-attr]
    written = (imported / "config.json").stat().st_mtime_ns
    assert train.main(["--init-from", "./gpt2/", *TEXT, *FLAGS, "--out", "runs/again"]) == 0
    assert (imported / "config.json").stat().st_mtime_ns == written
    assert {path.name for path in (here / "runs").iterdir()} == {imported.name, "gpt2-my", "again"}
    # Another content is another import.
    config = json.loads((here / "gpt2/config.json").read_text())
    (here / "gpt2/config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-3}))
    assert train.main(["--init-from", "gpt2", *TEXT, *FLAGS, "--out", "runs/other"]) == 0
    assert len(list((here / "runs").iterdir())) == 5


@pytest.mark.unchecked_shapes
def test_a_name_on_the_hub_is_downloaded_where_no_folder_has_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    public("gpt2")
    (here / "snapshots").mkdir()
    shutil.move("gpt2", "snapshots/0a1b")
    asked = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append(name)
        return str(here / "snapshots/0a1b")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert train.main(["--init-from", "someone/gpt2", *TEXT, *FLAGS, "--out", "out/tuned"]) == 0
    assert asked == ["someone/gpt2"]
    [imported] = [path.name for path in (here / "out").iterdir() if path.name != "tuned"]
    assert imported.startswith("gpt2-")
    for path in ("snapshots/none", "./none", "out/tuned/none"):
        assert "is not a run folder" in refused(capsys, "--init-from", path)
    assert asked == ["someone/gpt2"]


def test_help_with_a_public_checkpoint_imports_nothing(here: Path, capsys: Any) -> None:
    public("gpt2")
    with pytest.raises(SystemExit):
        train.main(["--init-from", "gpt2", "--help"])
    assert "--init-from" in capsys.readouterr().out
    assert not (here / "runs").exists()


def test_doctor_examines_a_fine_tune_of_a_public_checkpoint(here: Path, capsys: Any) -> None:
    public("gpt2")
    assert doctor.main(["--init-from", "gpt2", *TEXT, *FLAGS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trains"]


def test_a_headless_encoder_has_nothing_to_learn_from_plain_text(here: Path, capsys: Any) -> None:
    write_sentence_folder(here / "minilm")
    assert "topology 'encoder-headless' can only be imported" in refused(capsys, "--init-from", "minilm", *TEXT, *FLAGS)
