"""The workload is the same for the same seed, and of the shape that was asked for."""

from collections import Counter
from itertools import pairwise

from understudy_demo.workload import Shape, make_workload

MODELS = [f"model-{i}" for i in range(200)]
SHAPE = Shape(requests=2000, clients=4, rate_per_s=10.0, exponent=0.9, steps=(1, 2), size=32)


def test_the_same_seed_gives_the_same_workload() -> None:
    assert make_workload(MODELS, SHAPE, 7) == make_workload(MODELS, SHAPE, 7)
    assert make_workload(MODELS, SHAPE, 7) != make_workload(MODELS, SHAPE, 8)


def test_requests_come_in_order_at_about_the_wanted_rate() -> None:
    requests = make_workload(MODELS, SHAPE, 1)
    assert [request.index for request in requests] == list(range(2000))
    assert all(a.at_s <= b.at_s for a, b in pairwise(requests))
    assert 150 < requests[-1].at_s < 260, "2000 requests at 10 a second"
    assert {request.client for request in requests} == {0, 1, 2, 3}
    assert {request.steps for request in requests} == {1, 2}


def test_popularity_falls_off_and_the_tail_is_long() -> None:
    counts = Counter(r.model for r in make_workload(MODELS, SHAPE, 2))
    popular = [count for _, count in counts.most_common()]
    assert len(counts) >= 150
    assert popular[0] > 5 * popular[len(popular) // 2]
    assert max(popular) < 600


def test_bursts_repeat_a_model_and_overlap() -> None:
    def repeats(burst: float) -> float:
        requests = make_workload(MODELS, Shape(requests=1000, clients=4, rate_per_s=10, burst=burst), 3)
        return sum(a.model == b.model for a, b in pairwise(requests)) / 999

    assert repeats(1.0) < 0.1
    assert repeats(1.0) + 0.1 < repeats(4.0) < 0.9


def test_prompt_and_seed_go_together() -> None:
    requests = make_workload(MODELS, SHAPE, 4)
    assert len({(r.prompt, r.seed) for r in requests}) == SHAPE.variants
