"""Every pipeline kind of the table that can serve several requests in one call: each gets its own picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage_kit import Rig, asked, pixels
from test_kinds import FIELDS
from understudyd.core.events import ImagesEncoded, LeaseEnded
from understudyd.stage.batching import can_share
from understudyd.stage.calls import read_call
from understudyd.store.ingest import ingest
from understudyd.store.store import Store
from zoo.kinds import KINDS, Kind

CLOSE = 1
"""Bytes of pictures may differ so from those of a request alone, of 255."""

WISHES = {
    "x": {"prompt": "a red circle on blue", "seed": 1},
    "y": {"prompt": "house", "seed": 2},
    "z": {"prompt": "a tree, a dog and the sea at night, in a prompt of another length", "seed": 3},
}


def shares(kind: Kind) -> bool:
    """It can be asked for by text alone, and takes several."""
    needs_images = any(isinstance(value, Image.Image) for value in kind.arguments().values())
    return kind.has_prompt and not needs_images and can_share(read_call(type(kind.build(1))))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_gets_its_own_picture(kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not shares(kind):
        pytest.skip("by its signature, a request of this kind runs alone")
    store = Store.open(tmp_path / "store", writable=True)
    ingest(store, "m", kind.save(1, tmp_path / "source"), dtype=kind.ingested_as)
    given = kind.arguments()
    settings = {FIELDS[name]: value for name, value in given.items() if name in FIELDS and name != "prompt"}
    settings["options"] = {name: value for name, value in given.items() if name not in FIELDS}
    wishes = {name: asked(**wish, **settings) for name, wish in WISHES.items()}
    rig = Rig(store)
    try:
        rig.serve("m")
        alone = {name: pixels(rig.run("m", **wish, **settings)) for name, wish in WISHES.items()}
        rig.stage.put_on_deck("x", "m", wishes["x"], {name: wishes[name] for name in ("y", "z")})
        for name in WISHES:
            rig.wait_for(ImagesEncoded(name))
            rig.wait_for(LeaseEnded(name))
        together = {name: pixels(rig.stage.take_result(name)) for name in WISHES}
    finally:
        rig.close()
    assert "one by one" not in caplog.text
    for name in WISHES:
        assert farthest(together[name], alone[name]) <= CLOSE
        assert min(farthest(together[name], alone[other]) for other in WISHES if other != name) > 8 * CLOSE


def farthest(images: list[bytes], others: list[bytes]) -> int:
    """The largest difference of two bytes at the same place."""
    one, other = (np.frombuffer(b"".join(each), np.uint8).astype(int) for each in (images, others))
    return int(np.abs(one - other).max())
