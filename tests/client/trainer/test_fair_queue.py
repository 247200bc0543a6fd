"""One order at a time, and no study waits for all of another's."""

from __future__ import annotations

import threading

import pytest

from fedward_client.fair_queue import Cancelled, FairScheduler


def test_studies_are_served_in_turn_however_many_orders_one_has() -> None:
    turns, served, lock = FairScheduler(), list[str](), threading.Lock()

    def work(study: str) -> None:
        with turns.turn(study):
            assert lock.acquire(blocking=False)  # nobody else is at work
            served.append(study)
            lock.release()

    threads = []
    with turns.turn("first"):
        for number, study in enumerate("aaabbc", start=1):
            threads.append(threading.Thread(target=work, args=(study,)))
            threads[-1].start()
            while turns.waiting() < number:
                threading.Event().wait(0.001)
    for one in threads:
        one.join(10)
    assert served == ["a", "b", "c", "a", "b", "a"]


def test_who_is_given_up_goes_and_the_others_stay() -> None:
    turns, told = FairScheduler(), list[str]()

    def work(study: str) -> None:
        try:
            with turns.turn(study):
                told.append(study)
        except Cancelled:
            told.append(f"not {study}")

    threads = [threading.Thread(target=work, args=(study,)) for study in ("a", "a", "b")]
    with turns.turn("first") as gone:
        for number, one in enumerate(threads, start=1):
            one.start()
            while turns.waiting() < number:
                threading.Event().wait(0.001)
        assert turns.give_up("a") == 2
        assert turns.give_up("first") == 1
        assert gone.is_set()
        assert turns.give_up("nobody") == 0
    for one in threads:
        one.join(10)
    assert sorted(told) == ["b", "not a", "not a"]
    turns.close()
    with pytest.raises(Cancelled), turns.turn("late"):
        raise AssertionError("closed")
