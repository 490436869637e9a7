"""Made-up requests with the shape of real ones: skewed drifting popularity, bursts, clients that return.

How a trace is made, one seeded generator for all of it:

* Models have Zipf popularity (exponent `skew`); every `drift_s` one of them changes places with another.
* A client has a few favourite models, drawn by popularity when it comes for the first time. Some clients come
  far more often than others (Zipf again).
* Sessions start as a Poisson process whose rate swings over the day. A session is one client asking again
  and again: a geometric number of requests with log-normal pauses, most with the model it used last, some
  with another favourite, a few with any model.
* Adapters, where there are any, are dealt out to the models and have Zipf popularity among those of a model.
  Most requests carry one, some two, in a few scales; a client that stays with a model stays with them too.
* Steps and images are drawn from the few values that people use.

Three of four consecutive requests then want another model, because sessions overlap, while each client
stays with its models for a while.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from understudyd.recorded import TraceRequest, loras_text

Look = tuple[str, str]
"""A model and its adapters."""

DAY_S = 86_400.0


@dataclass(frozen=True)
class Shape:
    """What a synthetic trace is like.

    `session_every_s` is the mean of the quiet hour between a day's peak, `exp(peak)` times as busy, and its
    night. `stay` and `stray` are the chances that a client's next request is for the model it used last, or
    for any; otherwise it is for one of its `favourites`. `lora_share` of them have one of the `loras`,
    and `second_lora_share` of that a second.
    """

    models: int = 72
    clients: int = 3000
    skew: float = 1.6
    favourites: int = 3
    session_every_s: float = 1500.0
    session_requests: float = 5.0
    pause_median_s: float = 60.0
    pause_spread: float = 1.2
    peak: float = 3.0
    stay: float = 0.6
    stray: float = 0.04
    drift_s: float = 6 * 3600.0
    loras: int = 0
    lora_skew: float = 1.0
    lora_share: float = 0.8
    second_lora_share: float = 0.15
    seed: int = 1


def generate(requests: int, shape: Shape = Shape()) -> Iterator[TraceRequest]:
    """So many requests by arrival, in memory that does not grow with their number."""
    dice = random.Random(shape.seed)  # noqa: S311  no secret is made of it
    popularity = list(accumulate((i + 1) ** -shape.skew for i in range(shape.models)))
    visits = list(accumulate((i + 1) ** -0.7 for i in range(shape.clients)))
    names = [f"m{i:04}" for i in range(shape.models)]
    loras = {name: [f"x{i:04}" for i in range(k, shape.loras, shape.models)] for k, name in enumerate(names)}
    dice.shuffle(names)
    favourites: dict[int, list[Look]] = {}
    pending: list[tuple[float, int, int, Look]] = []
    order = itertools.count()
    session_at_s, drift_at_s, made, first_s = 0.0, shape.drift_s, 0, 0.0

    def draw() -> Look:
        name = dice.choices(names, cum_weights=popularity)[0]
        return name, _adapters(loras[name], shape, dice)

    while made < requests:
        if not pending or session_at_s <= pending[0][0]:
            client = dice.choices(range(shape.clients), cum_weights=visits)[0]
            known = favourites.setdefault(client, [draw() for _ in range(shape.favourites)])
            heapq.heappush(pending, (session_at_s, next(order), client, dice.choice(known)))
            swing = math.exp(shape.peak * math.sin(2 * math.pi * session_at_s / DAY_S))
            session_at_s += dice.expovariate(swing / shape.session_every_s)
            continue
        at_s, _, client, look = heapq.heappop(pending)
        first_s = first_s if made else at_s
        made += 1
        yield TraceRequest(
            arrival_s=round(at_s - first_s, 1),
            client=f"c{client:04}",
            model=look[0],
            loras=look[1],
            task="text-to-image",
            images=dice.choices((1, 2, 4, 8), (60, 8, 20, 12))[0],
            steps=dice.choices((30, 40, 20), (92, 5, 3))[0],
        )
        if dice.random() < 1.0 - 1.0 / shape.session_requests:
            pause_s = dice.lognormvariate(math.log(shape.pause_median_s), shape.pause_spread)
            luck = dice.random()
            if luck < shape.stray:
                look = draw()
            elif luck > shape.stay + shape.stray:
                look = dice.choice(favourites[client])
            heapq.heappush(pending, (at_s + pause_s, next(order), client, look))
        if at_s >= drift_at_s:
            drift_at_s += shape.drift_s
            one, other = dice.randrange(shape.models), dice.randrange(shape.models)
            names[one], names[other] = names[other], names[one]
            for client in list(favourites)[:: len(names)]:
                favourites[client] = [draw() for _ in range(shape.favourites)]


def _adapters(loras: Sequence[str], shape: Shape, dice: random.Random) -> str:
    """None, one or two of a model's adapters, as `TraceRequest.loras` has them."""
    if not loras or dice.random() >= shape.lora_share:
        return ""
    count = 2 if len(loras) > 1 and dice.random() < shape.second_lora_share else 1
    popularity = [(i + 1) ** -shape.lora_skew for i in range(len(loras))]
    chosen = dict.fromkeys(dice.choices(loras, popularity, k=count))
    return loras_text((name, dice.choices((1.0, 0.8, 0.6), (70, 20, 10))[0]) for name in chosen)


def csv_lines(requests: Iterator[TraceRequest], *, with_loras: bool = False) -> Iterator[str]:
    """The requests as a file that `trace.read` reads."""
    yield "arrival_s,client,model,task,images,steps" + (",loras\n" if with_loras else "\n")
    for r in requests:
        last = f",{r.loras}\n" if with_loras else "\n"
        yield f"{r.arrival_s:g},{r.client},{r.model},{r.task},{r.images},{r.steps}{last}"
