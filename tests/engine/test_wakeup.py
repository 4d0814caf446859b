import threading

import pytest

from server.engine.wakeup import Wakeup


@pytest.fixture
def wakeup():
    wakeup = Wakeup()
    yield wakeup
    wakeup.close()


def test_it_is_readable_from_set_to_clear(wakeup):
    wakeup.clear()
    assert not wakeup.wait(0)
    wakeup.set()
    wakeup.set()
    assert wakeup.wait(0)
    assert wakeup.wait(0)
    wakeup.clear()
    assert not wakeup.wait(0)


def test_another_thread_ends_the_wait(wakeup):
    thread = threading.Thread(target=wakeup.set)
    thread.start()
    assert wakeup.wait(30)
    thread.join()
