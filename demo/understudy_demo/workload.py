"""A bursty mixed workload, the same for the same seed: who asks which model for what, and when.

Models are popular by Zipf's law. Requests come in bursts: a client settles on a model, sends a few
prompts close together and goes away; bursts of several clients overlap, so that neighbours in the
queue mostly want different models.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

PROMPTS = (
    "a red circle on blue",
    "three small green triangles on white",
    "a big yellow star on purple",
    "two white squares on striped green",
    "a blue cross on orange, on the left",
    "four small black circles on dotted yellow",
)


@dataclass(frozen=True, slots=True)
class Request:
    """One image wanted `at_s` seconds after the start, by `client`. Sizes are pixels."""

    index: int
    client: int
    model: str
    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    at_s: float
    guidance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the workload looks like.

    `rate_per_s` is the mean arrival rate of requests, `burst` the mean number of requests in a
    burst and `spread_s` the mean pause inside one. `variants` is how many (prompt, seed) pairs a model is
    asked for; `exponent` is Zipf's; `guidance` None leaves it to the pipeline.
    """

    requests: int
    clients: int
    rate_per_s: float
    exponent: float = 1.0
    burst: float = 3.0
    spread_s: float = 0.1
    variants: int = 6
    steps: tuple[int, ...] = (4,)
    size: int = 64
    guidance: float | None = None


def make_workload(models: Sequence[str], shape: Shape, seed: int = 0) -> list[Request]:
    """The requests in the order of their arrival."""
    rng = random.Random(seed)
    ranked = list(models)
    rng.shuffle(ranked)
    weights = [1 / rank**shape.exponent for rank in range(1, len(ranked) + 1)]
    drafts: list[tuple[float, int, str]] = []
    burst_at_s = 0.0
    while len(drafts) < shape.requests:
        client = rng.randrange(shape.clients)
        model = rng.choices(ranked, weights)[0]
        at_s = burst_at_s
        for _ in range(_geometric(rng, shape.burst)):
            drafts.append((at_s, client, model))
            at_s += rng.expovariate(1 / shape.spread_s)
        burst_at_s += rng.expovariate(shape.rate_per_s / shape.burst)
    drafts = sorted(drafts[: shape.requests])
    return [_request(rng, index, draft, shape) for index, draft in enumerate(drafts)]


def _geometric(rng: random.Random, mean: float) -> int:
    """1, 2, 3, ... with this mean."""
    count = 1
    while rng.random() > 1 / mean:
        count += 1
    return count


def _request(rng: random.Random, index: int, draft: tuple[float, int, str], shape: Shape) -> Request:
    at_s, client, model = draft
    variant = rng.randrange(shape.variants)
    return Request(
        index=index,
        client=client,
        model=model,
        prompt=PROMPTS[variant % len(PROMPTS)],
        seed=1_000 + variant,
        steps=rng.choice(shape.steps),
        width=shape.size,
        height=shape.size,
        at_s=at_s,
        guidance=shape.guidance,
    )
