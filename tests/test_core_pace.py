"""One event sets off a bounded effort: what is left follows at the next, which is due at once."""

from core_kit import ScriptedLoaders, ScriptedStage, World, model
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.pace import MUCH
from understudyd.core.policy import PolicySettings

LAG_S = 0.001


class Recorded(World):
    """`told` has each event, when it came, and what it set off."""

    def __init__(self, much: int, encode_s: float = 1.0) -> None:
        """Room for three blobs, and they are taken: by what runs, by what runs next, and two others wait."""
        self.told: list[tuple[ev.Event, float, list[type[ac.Action]]]] = []
        infos = [model("runs", 1, 1), model("next", 1), model("a", 1), model("b", 1)]
        super().__init__(
            3,
            models=infos,
            loaders=ScriptedLoaders(2, seconds_per_page=0.1),
            stage=ScriptedStage(lease_lag_s=LAG_S, encode_s=encode_s),
            policy=PolicySettings(prefetch=False),
            much=much,
        )
        self.ask("runs", id="first")
        self.ask("next")
        self.run(for_s=1.0)
        assert "first" in self.machine.running
        self.ask("a")
        self.ask("b")
        self.run(for_s=0.5)
        assert not self.machine.residency.loads and not self.machine.is_unsettled
        self.told.clear()

    def tell(self, event: ev.Event) -> list[ac.Action]:
        actions = super().tell(event)
        self.told.append((event, self.now_s, [type(action) for action in actions]))
        return actions

    def loading(self) -> list[tuple[ev.Event, float, int]]:
        """The events that set off loads, and how many."""
        found = [(event, at_s, actions.count(ac.StartLoad)) for event, at_s, actions in self.told]
        return [(event, at_s, loads) for event, at_s, loads in found if loads]


def test_where_there_is_little_one_event_finds_room_for_both() -> None:
    world = Recorded(MUCH)
    world.run(for_s=5.0)
    ((event, _, loads),) = world.loading()
    assert isinstance(event, ev.LeaseEnded) and loads == 2
    world.finish()


def test_where_there_is_much_one_event_finds_room_once_and_the_next_follows_at_once() -> None:
    world = Recorded(1)
    world.run(for_s=5.0)
    ended_s = next(at_s for event, at_s, _ in world.told if isinstance(event, ev.LeaseEnded))
    assert [(type(event), at_s, loads) for event, at_s, loads in world.loading()] == [
        (ev.Ticked, ended_s, 1),  # with the lease's end it was filed what may be evicted now
        (ev.Ticked, ended_s, 1),
    ]
    assert not world.machine.is_unsettled
    world.finish()


def test_an_answer_in_between_does_not_make_it_forget() -> None:
    """Images encoded set nothing off, unless something was left."""
    world = Recorded(1, encode_s=LAG_S)
    world.run(for_s=5.0)
    assert [type(event) for event, _, _ in world.loading()] == [ev.ImagesEncoded, ev.Ticked]
    world.finish()


def test_who_runs_next_is_told_before_room_is_looked_for() -> None:
    world = Recorded(1)
    world.run()
    chosen = [actions for _, _, actions in world.told if ac.PutOnDeck in actions]
    assert len(chosen) == 2 and all(ac.StartLoad not in actions for actions in chosen)
