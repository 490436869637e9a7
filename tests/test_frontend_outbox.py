"""The outbox alone: what is coalesced, what is kept, what is dropped first."""

from hypothesis import given
from hypothesis import strategies as st

from understudyd.shell.outbox import Outbox

KINDS = ("accepted", "progress")
MESSAGE = 512  # what an outbox counts for each message beside its bytes


def sent_all(box: Outbox, now: float = 0.0) -> list[tuple[bytes, ...]]:
    out = []
    while (frames := box.head) is not None:
        out.append(frames)
        box.sent(now)
    return out


def test_a_newer_hint_replaces_the_unsent_one() -> None:
    box = Outbox(10_000, 60)
    for step in (b"1", b"2", b"3"):
        box.put_hint("a", "progress", (step,), 0)
    assert sent_all(box) == [(b"3",)]
    assert box.is_empty and box.size_bytes == 0


def test_an_answer_makes_its_hints_pointless_and_leaves_first() -> None:
    box = Outbox(10_000, 60)
    box.put_hint("a", "accepted", (b"a0",), 0)
    box.put_hint("b", "progress", (b"b1",), 0)
    box.put_hint("a", "progress", (b"a1",), 0)
    box.put_answer("a", KINDS, (b"a!",), 0)
    assert sent_all(box) == [(b"a!",), (b"b1",)]


def test_a_sent_answer_can_be_repeated_until_its_time_is_over() -> None:
    box = Outbox(10_000, answer_ttl_s=60)
    box.put_answer("a", KINDS, (b"a!", b"image"), 0)
    sent_all(box, now=1)
    box.repeat("a", 2)
    box.repeat("a", 3)
    assert sent_all(box, now=5) == [(b"a!", b"image")]
    box.expire(64.9)
    assert box.is_answered("a")
    box.expire(65.0)
    assert not box.is_answered("a") and box.is_empty and box.size_bytes == 0


def test_a_notice_is_not_kept_and_never_replaces_an_answer() -> None:
    box = Outbox(10_000, 60)
    box.put_notice("a", (b"no",), 0)
    assert sent_all(box) == [(b"no",)] and box.is_empty
    box.put_answer("a", KINDS, (b"a!",), 0)
    box.put_notice("a", (b"no",), 0)
    assert sent_all(box) == [(b"a!",)]


def test_what_is_dropped_first() -> None:
    box = Outbox(3 * (MESSAGE + 10), 60)
    box.put_answer("kept", KINDS, (b"x" * 10,), 0)
    sent_all(box)
    box.put_hint("b", "progress", (b"x" * 10,), 0)
    box.put_answer("b2", KINDS, (b"x" * 10,), 0)
    assert box.trim() == []
    box.put_answer("c", KINDS, (b"x" * 10,), 0)
    assert box.trim() == [] and len(box) == 2 and box.is_answered("kept")  # the hint went
    box.put_answer("d", KINDS, (b"x" * 10,), 0)
    assert box.trim() == [] and not box.is_answered("kept")
    box.put_answer("e", KINDS, (b"x" * 10,), 0)
    assert box.trim() == ["b2"] and len(box) == 3


ids = st.sampled_from("ab")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("hint"), ids, st.integers(0, 400)),
        st.tuples(st.just("answer"), ids, st.integers(0, 2000)),
        st.tuples(st.just("notice"), ids, st.integers(0, 400)),
        st.tuples(st.just("send"), ids, st.just(0)),
        st.tuples(st.just("repeat"), ids, st.just(0)),
        st.tuples(st.just("expire"), ids, st.integers(0, 30)),
    ),
    max_size=60,
)


@given(steps)
def test_the_cap_holds_and_every_answer_leaves_or_is_reported(script: list[tuple[str, str, int]]) -> None:
    box = Outbox(4000, 60)
    now = 0.0
    owed: dict[str, bytes] = {}
    for serial, (what, request_id, size) in enumerate(script):
        match what:
            case "hint":
                box.put_hint(request_id, "progress", (b"h" * size,), now)
            case "notice":
                box.put_notice(request_id, (b"n" * size,), now)
            case "answer":
                owed[request_id] = f"{serial} ".encode() + b"x" * size
                box.put_answer(request_id, KINDS, (owed[request_id],), now)
            case "repeat":
                box.repeat(request_id, now)
            case "expire":
                now += size
                box.expire(now)
            case _:
                if (head := box.head) is not None:
                    box.sent(now)
                    owed = {key: frame for key, frame in owed.items() if frame != head[0]}
        hints_before, unsent_before = len(box), box.size_bytes
        lost = box.trim()
        for key in lost:
            owed.pop(key, None)
        assert box.size_bytes <= 4000
        assert not lost or (hints_before and unsent_before > 4000)
    left = {frames[0] for frames in sent_all(box, now)}
    assert set(owed.values()) <= left
    box.expire(now + 61)
    assert box.is_empty and box.size_bytes == 0
