"""Machines that differ are named before the first step; ranks wait for a slow rank 0 without a timeout."""

import os
import time
from contextlib import nullcontext

import pytest
import torch.distributed as dist
from ranks import run_ranks

from fitune.errors import UsageError
from fitune.training import distributed
from fitune.training.distributed import wait_for_all, wait_for_rank_0
from fitune.training.manifest import Identity
from fitune.training.same_on_all import first_difference, refuse_differences

SAME = {"base.sample": "a" * 64, "data (train.jsonl)": "b" * 64, "version of torch": "2.11.0"}


@pytest.mark.parametrize(
    ("fact", "theirs", "said"),
    [
        ("base.sample", "f" * 64, "base.sample is aaaaaaaaaaaa on one (rank 0) and ffffffffffff on two (rank 2); copy"),
        ("data (train.jsonl)", "e" * 64, "data (train.jsonl) is bbbbbbbbbbbb on one (rank 0) and eeeeeeeeeeee on two"),
        (
            "version of torch",
            "2.13.0",
            "version of torch is 2.11.0 on one (rank 0) and 2.13.0 on two (rank 2); install",
        ),
        ("version of torch", None, "2.11.0 on one (rank 0) and missing on two"),
    ],
)
def test_what_differs_is_named_with_machines_and_values(fact, theirs, said):
    other = {name: value for name, value in (SAME | {fact: theirs}).items() if value}
    message = first_difference([("one", SAME), None, ("two", other), None])
    assert said in message and "\n" not in message
    assert first_difference([("one", SAME), None, ("two", SAME), None]) is None


def _compare(bases: list[str]) -> str:
    dist.init_process_group("gloo")
    sample = {"sample": bases[dist.get_rank()]}
    identity = Identity(base="m", revision=None, base_fingerprint=sample, data="d", template="t", tokenizer="k", seed=1)
    try:
        refuse_differences(identity, nullcontext)
    except UsageError as error:
        return str(error)
    return "same"


def test_all_ranks_refuse_together():
    assert run_ranks(_compare, 2, ["x" * 64, "x" * 64]) == ["same", "same"]
    first, second = run_ranks(_compare, 2, ["x" * 64, "y" * 64])
    assert first == second and first.startswith("the machines differ: base.sample is xxxxxxxxxxxx on ")


def _come_late(seconds: list[float]) -> float:
    dist.init_process_group("gloo")
    distributed.LOOK_SECONDS = 0.2
    time.sleep(seconds[dist.get_rank()])
    began = time.monotonic()
    wait_for_rank_0("an event")
    return time.monotonic() - began


def test_a_slow_rank_0_is_waited_for_beyond_any_timeout():
    """Looked for in vain again and again: under a collective's timeout once would have been the end."""
    waited = run_ranks(_come_late, 3, [2.0, 0.0, 0.0])
    assert min(waited[1:]) > 0.5


def _meet_twice(seconds: list[float]) -> list[float]:
    dist.init_process_group("gloo")
    distributed.LOOK_SECONDS = 0.2
    waited = []
    for slow in (1, 0):
        time.sleep(seconds[dist.get_rank()] if dist.get_rank() == slow else 0)
        began = time.monotonic()
        wait_for_all()
        waited.append(time.monotonic() - began)
    return waited


def test_ranks_wait_for_the_slowest_of_all_beyond_any_timeout_each_time_anew():
    first, second, third = run_ranks(_meet_twice, 3, [1.5, 1.5, 0.0])
    assert first[0] > 0.5 and third[0] > 0.5 and second[1] > 0.5 and third[1] > 0.5


@pytest.mark.parametrize(
    ("address", "chosen", "taken"),
    [("127.0.0.1", None, "lo"), ("localhost", "eth7", "eth7"), ("no such host", None, None)],
)
def test_gloo_talks_through_the_interface_that_reaches_machine_0(address, chosen, taken, monkeypatch):
    monkeypatch.setattr(os, "environ", {"GLOO_SOCKET_IFNAME": chosen} if chosen else {})
    distributed._meet_on_network_of(address)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == taken
