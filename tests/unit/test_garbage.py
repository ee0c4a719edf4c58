"""What collections of garbage look at while a job is measured."""

import contextlib
import gc
import weakref

from paceline.train.garbage import only_what_is_made


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_made_is_collected_and_what_was_there_before_is_left_out():
    before = [Node() for _ in range(3)]
    with only_what_is_made():
        assert not any(type(there) is Node for there in gc.get_objects())
        made = weakref.ref(Node())
        gc.collect()
        assert made() is None
    assert sum(type(there) is Node for there in gc.get_objects()) == len(before)


def test_afterwards_all_is_looked_at_again_even_if_it_failed():
    lost = weakref.ref(node := Node())
    with contextlib.suppress(RuntimeError), only_what_is_made():
        del node
        gc.collect()
        assert lost() is not None
        raise RuntimeError
    gc.collect()
    assert lost() is None
