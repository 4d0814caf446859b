from server.messages import Request, SamplingParams
from server.scheduling.policy import FirstComeFirstServed, Policy
from server.scheduling.sequence import Sequence


def test_first_come_first_served_keeps_the_order_of_arrival() -> None:
    policy: Policy = FirstComeFirstServed()
    line = [
        Sequence(Request(f"r{i}", [1], SamplingParams(max_tokens=1)), arrival=float(i), order=i)
        for i in range(5)
    ]
    assert sorted([*line[3:], *line[:3]], key=lambda seq: policy.rank(seq, now=9.0)) == line
