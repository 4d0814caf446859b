from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.lora.promises import Promises
from server.messages import ErrorCode
from server.scheduling.adapter_gate import Acquire, AcquireStatus

BROKEN = Acquire(AcquireStatus.FAILED, ErrorCode.ADAPTER_LOAD_FAILED, "broken")
XY, Y, Z = frozenset("xy"), frozenset("y"), frozenset("z")


@given(ops=st.lists(st.tuples(st.booleans(), st.frozensets(st.sampled_from("abc"), max_size=3)), max_size=30))
def test_a_version_is_promised_as_long_as_any_mix_with_it(ops: list[tuple[bool, frozenset[str]]]) -> None:
    promises, mixes = Promises(), set[frozenset[str]]()
    for add, mix in ops:
        if add:
            promises.add(mix)
            mixes.add(mix)
        else:
            mixes.discard(mix)
            for digest in promises.remove(mix):
                assert digest in mix
                assert digest not in promises
        assert set(promises.mixes) == mixes
        assert {digest for digest in "abc" if digest in promises} == set().union(*mixes)


def test_a_failure_is_owed_to_all_who_ask_in_the_step_in_which_it_is_given() -> None:
    promises = Promises()
    promises.add(XY)
    promises.add(Y)
    promises.fail("y", BROKEN)
    promises.next_step()
    assert promises.failed("y")
    assert promises.failure(XY) is promises.failure(Y) is BROKEN
    promises.remove(XY)
    promises.remove(Y)
    assert promises.failure(Y) is BROKEN
    promises.next_step()
    assert promises.failure(Y) is None


def test_a_failure_that_nobody_is_promised_is_forgotten() -> None:
    promises = Promises()
    promises.fail("z", BROKEN)
    assert not promises.failed("z")
    promises.add(Z)
    promises.fail("z", BROKEN)
    assert promises.remove(Z) == ["z"]
    assert not promises.failed("z")
