"""Who is lost among ranks, how ranks of one attempt meet, and what a signal means: without processes."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from minitransformer.errors import UserError
from minitransformer.runs.begin import check_same_data
from minitransformer.training import launch
from minitransformer.training import ranks as ranks_module
from minitransformer.training.launch import ATTEMPT, earlier_end, meet, note_end
from minitransformer.training.liveness import HANG, SUSPECT, Beat, Ending, Vigil
from minitransformer.training.ranks import Processes, Ranks, check_gpus
from minitransformer.training.signals import StopRequest

NAMES = ["rank 0 (process 7 on a)", "rank 1 (process 8 on a)", "rank 2 (process 9 on b)"]


def vigil(timeout: float = 60.0) -> Vigil:
    return Vigil(1, NAMES, timeout)


def hear(vigil: Vigil, seconds: int, silent: tuple[int, ...] = (), stand_still: bool = False, **about: Any) -> None:
    """`seconds` of beats, except of the ranks `silent`."""
    for _ in range(seconds):
        beats = [
            old if rank in silent else replace(old, number=old.number + 1, steps=old.steps + (not stand_still), **about)
            for rank, old in enumerate(vigil.beats)
        ]
        vigil.hear(beats, 1.0)


@given(st.builds(Beat, st.integers(0), st.integers(0), st.booleans(), st.text(), st.none() | st.integers(0, 255)))
def test_a_beat_is_read_as_it_was_written(beat: Beat) -> None:
    assert Beat.decode(beat.encode().encode()) == beat


def test_ranks_that_beat_are_never_lost() -> None:
    watching = vigil()
    hear(watching, 10_000)
    assert watching.ending() is None


@given(silent=st.sets(st.sampled_from([0, 2]), min_size=1), timeout=st.integers(10, 600))
def test_a_silent_rank_is_named_within_the_timeout_and_not_long_before(silent: set[int], timeout: int) -> None:
    watching = vigil(timeout)
    hear(watching, 3)
    hear(watching, timeout - 3, tuple(silent))
    assert watching.ending() is None
    hear(watching, 2, tuple(silent))
    ending = watching.ending()
    assert ending is not None
    assert ending.code == 1
    assert [name in ending.sentence for name in NAMES] == [rank in silent for rank in range(3)]


def test_after_a_sign_that_one_is_lost_a_silent_rank_is_named_sooner_than_torchrun_kills() -> None:
    watching = vigil()
    hear(watching, int(SUSPECT), (2,))
    assert watching.ending() is None
    watching.alarmed = True
    ending = watching.ending()
    assert ending is not None
    assert NAMES[2] in ending.sentence
    assert SUSPECT < 20


def test_a_rank_that_has_reported_an_error_ends_the_others_with_its_code_in_silence() -> None:
    watching = vigil()
    watching.hear([Beat(1), Beat(1), Beat(1, code=3)], 1.0)
    assert watching.ending() == Ending(3, "")


def test_a_store_that_does_not_answer_is_the_loss_of_the_node_of_rank_0() -> None:
    watching = vigil()
    hear(watching, 5)
    watching.unheard = 59.0
    ending = watching.ending()
    assert ending is not None
    assert NAMES[0] in ending.sentence
    hear(watching, 1)
    assert watching.ending() is None


def test_before_the_first_step_work_may_take_any_time_and_then_an_hour() -> None:
    watching = vigil()
    hear(watching, 100_000, stand_still=True)
    assert watching.ending() is None
    hear(watching, 1)
    hear(watching, HANG * 60, stand_still=True)
    assert watching.ending() is None
    hear(watching, 2, stand_still=True)
    assert watching.ending() is not None


def test_of_ranks_that_stand_still_those_that_wait_for_others_are_not_to_blame() -> None:
    watching = vigil(10)
    beats = [Beat(1, 5, waits=True, place="a.py:1 (f)"), Beat(1, 5, waits=True), Beat(1, 5, place="b.py:2 (g)")]
    for number in range(HANG * 10 + 3):
        watching.hear([replace(beat, number=number) for beat in beats], 1.0)
    ending = watching.ending()
    assert ending is not None
    assert f"{NAMES[2]} at b.py:2 (g)" in ending.sentence
    assert NAMES[0] not in ending.sentence


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_meet_whatever_earlier_attempts_have_left_in_the_store(size: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(launch, "MEETING", 20.0)
    store = HashStore()
    attempts = set()
    for _ in range(3):
        with ThreadPoolExecutor(size) as pool:
            # Rank 0 comes last, when the others have read the name of the attempt before.
            others = [pool.submit(meet, store, rank, size) for rank in range(1, size)]
            met = [meet(store, 0, size), *(each.result() for each in others)]
        [attempt] = {attempt for attempt, _ in met}
        attempts.add(attempt)
        assert all([name.split(" (")[0] for name in names] == [f"rank {i}" for i in range(size)] for _, names in met)
        assert store.get(ATTEMPT).decode() == attempt
    assert len(attempts) == 3


def test_what_has_ended_for_good_is_not_tried_again_but_goes_on_when_nodes_join(monkeypatch: Any) -> None:
    store = HashStore()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert earlier_end(store) is None
    note_end(store, 143)
    assert earlier_end(store) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert earlier_end(store) == 143


class Hearing(Ranks):
    """Ranks of which another one asks for `other`, while this process gets the signal `meanwhile`."""

    def __init__(self, other: int = 0, meanwhile: int | None = None) -> None:
        self.other, self.meanwhile = other, meanwhile

    def largest(self, number: int) -> int:
        if self.meanwhile is not None:
            signal.raise_signal(self.meanwhile)
        return max(number, self.other)


def test_a_signal_while_ranks_agree_is_kept_for_the_next_time() -> None:
    with StopRequest() as stop:
        assert not stop.agreed(Hearing(meanwhile=signal.SIGTERM))
        assert stop.agreed(Hearing())
        assert stop.exit_code == 143


def test_the_signal_that_all_ranks_get_is_no_second_one_after_another_rank_has_told_of_it() -> None:
    with StopRequest() as stop:
        assert stop.agreed(Hearing(other=signal.SIGTERM))
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGUSR1])
def test_a_notice_never_interrupts_and_ends_as_a_termination_does(first: signal.Signals) -> None:
    with StopRequest() as stop:
        for number in (first, signal.SIGUSR1, signal.SIGUSR1):
            signal.raise_signal(number)
        assert stop.exit_code == {signal.SIGINT: 130, signal.SIGUSR1: 143}[first]


def processes() -> Processes:
    class Silent:
        rank = 0
        vigil = Vigil(0, NAMES[:2], 60.0)

    return Processes(Silent(), HashStore())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variable", "device", "standard_input", "about"),
    [
        ("TORCHELASTIC_MAX_RESTARTS", "cpu", True, "--max-restarts"),
        ("GROUP_WORLD_SIZE", "cpu", True, "one node"),
        ("GROUP_WORLD_SIZE", "cuda:1", False, "'cuda:1'"),
    ],
)
def test_what_ranks_cannot_share_is_refused(
    variable: str, device: str, standard_input: bool, about: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UserError, match=about):
        processes().check_launch(device, standard_input=standard_input)
    processes().check_launch("cpu", standard_input=False)
    monkeypatch.delenv(variable)
    processes().check_launch("cpu", standard_input=True)


def test_more_ranks_than_gpus_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 ranks share 1 GPU"):
        check_gpus(processes(), torch.device("cuda"))
    check_gpus(processes(), torch.device("cpu"))


def test_other_data_on_a_rank_is_refused_on_all(tmp_path: Path) -> None:
    class Others(Ranks):
        def all(self, value: Any) -> list[Any]:
            return [value, value, tmp_path.name, value]

    prepared = SimpleNamespace(folder=tmp_path / "text-1")
    with pytest.raises(UserError, match="rank 2 has other data than rank 0"):
        check_same_data(Others(), prepared)  # type: ignore[arg-type]
    check_same_data(Ranks(), prepared)  # type: ignore[arg-type]


def test_ranks_that_do_not_all_start_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(launch, "MEETING", 0.2)
    for rank in range(2):
        with pytest.raises(UserError, match="the 2 ranks have not all started"):
            meet(HashStore(), rank, 2)


@pytest.mark.parametrize(("cores", "advice"), [(8, "; OMP_NUM_THREADS=4 would use all cores"), (2, "")])
def test_the_machine_line_says_how_to_use_cores_that_no_rank_uses(cores: int, advice: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(ranks_module, "processors", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert processes().unused_cores(torch.device("cpu")) == advice
    assert processes().unused_cores(torch.device("cuda")) == ""
