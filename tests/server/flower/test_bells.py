"""Who waits is woken by what was waited for, and by nothing else."""

from __future__ import annotations

from fedward.flower.batch_middleware import Notifier


def test_a_bell_rings_for_its_own_keys() -> None:
    bells = Notifier()
    with bells.listen([1, 2]) as mine, bells.listen([2, 3]) as other:
        bells.ring([1])
        assert mine.is_set()
        assert not other.is_set()
        mine.clear()
        bells.ring([2])
        assert mine.is_set()
        assert other.is_set()


def test_who_has_left_is_not_kept() -> None:
    bells = Notifier()
    with bells.listen([1, 1]) as outer:
        with bells.listen([1]) as inner:
            pass
        bells.ring([1, 4])
        assert outer.is_set()
        assert not inner.is_set()
    assert bells._waiting == {}


def test_everybody_can_be_woken() -> None:
    bells = Notifier()
    with bells.listen([1]) as one, bells.listen([2]) as two:
        bells.ring_all()
        assert one.is_set()
        assert two.is_set()
