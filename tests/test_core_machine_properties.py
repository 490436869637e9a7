"""The core machine against everything that can happen, in any order that the contract allows.

After every event `World.tell` checks the machine's own invariants and an independent ledger: leased and
filling bytes are not touched, live extents do not overlap, nobody is overtaken beyond the bounds, nobody is
answered twice. Every walk ends by letting all go well: then everything must be answered within a bounded
number of events, and without models the arena must be empty again.
"""

import os
import random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from core_walk import Walk, family, leftovers
from understudyd.core.pace import MUCH
from understudyd.core.policy import PolicySettings

WALKS = int(os.environ.get("UNDERSTUDY_WALKS", "150"))  # more of them, other ones: hunt by hand
FIRST_WALK = int(os.environ.get("UNDERSTUDY_FIRST_WALK", "0"))
STEPS = 250


class Anything(RuleBasedStateMachine):
    """Hypothesis chooses, and shrinks what it finds."""

    @initialize(
        data=st.data(),
        policy=st.builds(
            PolicySettings,
            order=st.sampled_from(["resident_first", "fcfs"]),
            lookahead=st.integers(0, 4),
            max_wait_s=st.sampled_from([30.0, 2.0, 1000.0]),
            max_skips=st.integers(0, 4),
            prefetch=st.booleans(),
            pause_priority=st.sampled_from([None, 1]),
        ),
        pages=st.integers(6, 20),
        loaders=st.integers(1, 2),
        pool_pages=st.sampled_from([0, 4, 12, 40]),
        much=st.sampled_from([MUCH, 1]),
    )
    def begin(
        self,
        data: st.DataObject,
        policy: PolicySettings,
        pages: int,
        loaders: int,
        pool_pages: int,
        much: int,
    ) -> None:
        def choose(options: Any) -> Any:
            return data.draw(st.sampled_from(options))

        infos = family(choose)
        self.walk = Walk(infos, policy, pages, loaders, pool_pages, much, leftovers(infos, choose))

    @rule(data=st.data(), kind=st.sampled_from(["ask", "take_back", "administer", "what_cannot_be"]))
    def somebody_acts(self, data: st.DataObject, kind: str) -> None:
        getattr(self.walk, kind)(lambda options: data.draw(st.sampled_from(options)))

    @rule(data=st.data(), kind=st.sampled_from(["goes_wrong", "loaders_change", "time_passes"]))
    def things_happen(self, data: st.DataObject, kind: str) -> None:
        getattr(self.walk, kind)(lambda options: data.draw(st.sampled_from(options)))

    @rule(steps=st.integers(1, 12), seed=st.integers(0, 1000))
    def all_is_well(self, steps: int, seed: int) -> None:
        choose = random.Random(seed).choice
        for _ in range(steps):
            self.walk.goes_well(choose)

    @rule(seed=st.integers(0, 1000))
    def busy_times(self, seed: int) -> None:
        choose = random.Random(seed).choice
        for _ in range(3):
            self.walk.ask(choose)

    def teardown(self) -> None:
        if hasattr(self, "walk"):
            self.walk.finish()


Anything.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestAnything = Anything.TestCase


def random_walk(seed: int) -> Walk:
    """A long walk on which most goes well, with a character of its own."""
    chance = random.Random(seed)
    policy = PolicySettings(
        order=chance.choice(["resident_first", "resident_first", "fcfs"]),
        lookahead=chance.randint(0, 4),
        max_wait_s=chance.choice([2.0, 30.0, 1000.0]),
        max_skips=chance.randint(0, 4),
        prefetch=chance.random() < 0.5,
        pause_priority=chance.choice([None, 1]),
    )
    pages, loaders, pool_pages = chance.randint(6, 24), chance.randint(1, 3), chance.choice([0, 4, 12, 40])
    much = chance.choice([MUCH, 1])
    infos = family(chance.choice)
    walk = Walk(infos, policy, pages, loaders, pool_pages, much, leftovers(infos, chance.choice))
    trouble = chance.choice([0.1, 0.5, 2.0])
    kinds = {
        "ask": chance.choice([1.0, 3.0, 6.0]),
        "goes_well": 10.0,
        "time_passes": 1.5,
        "take_back": 0.4 * trouble,
        "administer": 0.5 * trouble,
        "goes_wrong": 1.0 * trouble,
        "loaders_change": 0.5 * trouble,
        "what_cannot_be": 0.3,
    }
    for kind in chance.choices(list(kinds), list(kinds.values()), k=STEPS):
        getattr(walk, kind)(chance.choice)
    return walk


@pytest.mark.parametrize("first", range(0, WALKS, 10))
def test_long_random_walks_end_with_everything_answered(first: int) -> None:
    for seed in range(first + FIRST_WALK, first + FIRST_WALK + 10):
        try:
            random_walk(seed).finish()
        except BaseException as error:
            error.add_note(f"random_walk({seed})")
            raise
