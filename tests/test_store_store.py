"""Names, publishing, removal, damage and the writer lock, with hand-made models and no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from store_kit import listing, plain_draft
from understudyd.store import writer as writer_module
from understudyd.store.errors import StoreError
from understudyd.store.records import (
    ModelRecord,
    SignatureRecord,
    TensorRecord,
)
from understudyd.store.store import Store, check_name
from understudyd.store.writer import Draft, Writer

SIGNATURE = SignatureRecord(
    id="5" * 32,
    library="diffusers",
    class_name="UNet2DConditionModel",
    config={"sample_size": 8},
    size_bytes=4096,
    tensors=(
        TensorRecord(path="weight", kind="parameter", dtype="F32", shape=(4,), offset=0, size_bytes=16),
    ),
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", writable=True)


def draft(writer: Writer, name: str, *contents: bytes) -> Draft:
    """A model with one component per given byte, whose weights are that byte over and over."""
    return plain_draft(writer, name, {f"part{n}": (SIGNATURE, content) for n, content in enumerate(contents)})


def add(store: Store, name: str, *contents: bytes, replace: bool = False) -> ModelRecord:
    with store.writing() as writer:
        return writer.publish(draft(writer, name, *contents), replace=replace)


def code_of(caught: pytest.ExceptionInfo[StoreError]) -> str:
    return caught.value.code


@pytest.mark.parametrize("name", ["a", "A1", "sd-1.5_x", "9", "a..b", "x" * 128])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "_a", "a/b", "../a", "a\\b", "a b", "a\n", "a\0", "ä", "x" * 129]
)
def test_refused_names(name: str, store: Store) -> None:
    for use in (check_name, store.model, store.model_folder, store.remove):
        with pytest.raises(StoreError) as caught:
            use(name)
        assert code_of(caught) == "bad_name"


def test_a_missing_store_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        Store.open(tmp_path / "none", writable=False)
    assert code_of(caught) == "not_found"


def test_a_published_model_is_read_back(store: Store) -> None:
    record = add(store, "m", b"a", b"b")
    reader = Store.open(store.path, writable=False)
    assert reader.models() == {"m": record}
    assert reader.model("m") == record
    assert reader.signature(SIGNATURE.id) == SIGNATURE
    assert (reader.model_folder("m") / "scheduler" / "config.json").read_text() == "{}"
    assert all(reader.blob_path(c.blob.sha256).is_file() for c in record.components)
    assert reader.damaged() == {}
    assert list((store.path / "tmp").iterdir()) == []


def test_the_same_content_adds_nothing(store: Store) -> None:
    first = add(store, "m", b"a")
    before = listing(store.path)
    assert add(store, "m", b"a") == first
    assert listing(store.path) == before


def test_other_content_under_a_name_needs_replace(store: Store) -> None:
    add(store, "m", b"a")
    before = listing(store.path)
    with pytest.raises(StoreError) as caught:
        add(store, "m", b"b")
    assert code_of(caught) == "exists"
    assert listing(store.path) == before
    record = add(store, "m", b"b", replace=True)
    assert Store.open(store.path, writable=False).models() == {"m": record}
    with store.writing():
        pass  # the next writer clears the blob that nobody uses now
    assert len(list((store.path / "blobs").iterdir())) == 1


def test_replacing_works_where_folders_cannot_be_exchanged(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldLibc:
        @staticmethod
        def renameat2(*_: object) -> int:
            writer_module.ctypes.set_errno(writer_module.errno.ENOSYS)
            return -1

    add(store, "m", b"a")
    monkeypatch.setattr(writer_module.ctypes, "CDLL", lambda *_, **__: OldLibc)
    record = add(store, "m", b"b", replace=True)
    assert store.models() == {"m": record}


def test_replacing_repairs_a_flipped_bit(store: Store) -> None:
    record = add(store, "m", b"a")
    path = store.blob_path(record.components[0].blob.sha256)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + b"\1")
    add(store, "m", b"a", replace=True)
    assert path.read_bytes() == sound


def test_remove_frees_what_only_it_used(store: Store) -> None:
    add(store, "one", b"s", b"a")
    two = add(store, "two", b"s", b"b")
    size = store.blob_path(two.components[1].blob.sha256).stat().st_size
    assert store.remove("two") == size
    assert sorted(store.models()) == ["one"]
    assert len(list((store.path / "blobs").iterdir())) == 2
    assert store.remove("one") == 2 * size
    assert listing(store.path) == {}
    with pytest.raises(StoreError) as caught:
        store.remove("one")
    assert code_of(caught) == "not_found"


def test_a_reader_follows_changes(store: Store) -> None:
    reader = Store.open(store.path, writable=False)
    assert reader.models() == {}
    record = add(store, "m", b"a")
    assert reader.model("m") == record
    store.remove("m")
    with pytest.raises(StoreError) as caught:
        reader.model("m")
    assert code_of(caught) == "not_found"


def spoil_manifest(store: Store, record: ModelRecord) -> None:
    (store.model_folder(record.name) / "manifest.json").write_bytes(b'{"name": "m"')


def lose_manifest(store: Store, record: ModelRecord) -> None:
    (store.model_folder(record.name) / "manifest.json").unlink()


def age_manifest(store: Store, record: ModelRecord) -> None:
    rewrite(store, record, format_version=99)


def rename_manifest(store: Store, record: ModelRecord) -> None:
    rewrite(store, record, name="other")


def escape_blobs(store: Store, record: ModelRecord) -> None:
    component = record.components[0]
    blob = msgspec.structs.replace(component.blob, sha256="../../secret")
    rewrite(store, record, components=(msgspec.structs.replace(component, blob=blob),))


def escape_signatures(store: Store, record: ModelRecord) -> None:
    component = msgspec.structs.replace(record.components[0], signature="../x")
    rewrite(store, record, components=(component,))


def rewrite(store: Store, record: ModelRecord, **changes: object) -> None:
    changed = msgspec.json.encode(msgspec.structs.replace(record, **changes))
    (store.model_folder(record.name) / "manifest.json").write_bytes(changed)


def lose_blob(store: Store, record: ModelRecord) -> None:
    blob_of(store, record).unlink()


def cut_blob(store: Store, record: ModelRecord) -> None:
    os.truncate(blob_of(store, record), 100)


def fifo_blob(store: Store, record: ModelRecord) -> None:
    path = blob_of(store, record)
    path.unlink()
    os.mkfifo(path)


def link_blob(store: Store, record: ModelRecord) -> None:
    path = blob_of(store, record)
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def lose_signature(store: Store, record: ModelRecord) -> None:
    store.signature_path(record.components[0].signature).unlink()


def swap_signature(store: Store, record: ModelRecord) -> None:
    path = store.signature_path(record.components[0].signature)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"id": "6" * 32}))


def blob_of(store: Store, record: ModelRecord) -> Path:
    return store.blob_path(record.components[0].blob.sha256)


@pytest.mark.parametrize(
    "damage",
    [spoil_manifest, lose_manifest, age_manifest, rename_manifest, escape_blobs, escape_signatures,
     lose_blob, cut_blob, fifo_blob, link_blob, lose_signature, swap_signature],
)  # fmt: skip
def test_a_damaged_model_is_left_out_reported_and_mended(
    damage: object, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    record = add(store, "m", b"a")
    good = add(store, "good", b"b")
    damage(store, record)
    reader = Store.open(store.path, writable=False)
    if damage in (lose_signature, swap_signature):  # both models share it
        assert reader.models() == {}
        assert set(reader.damaged()) == {"m", "good"}
    else:
        assert reader.models() == {"good": good}
        assert set(reader.damaged()) == {"m"}
        assert "m is left out" in caplog.text
    with pytest.raises(StoreError) as caught:
        reader.model("m")
    assert code_of(caught) == "corrupt_store"
    add(Store.open(store.path, writable=True), "m", b"a")
    assert set(Store.open(store.path, writable=False).models()) == {"m", "good"}


def test_a_damaged_model_can_be_removed_and_costs_nobody_a_blob(store: Store) -> None:
    record = add(store, "m", b"a")
    good = add(store, "good", b"b")
    lose_manifest(store, record)
    with store.writing():  # cannot know what m named, so it deletes nothing
        pass
    assert len(list((store.path / "blobs").iterdir())) == 2
    assert store.remove("m") > 0
    assert store.models() == {"good": good}
    assert len(list((store.path / "blobs").iterdir())) == 1


def test_the_next_writer_clears_what_a_crash_left(store: Store) -> None:
    record = add(store, "m", b"a")
    (store.path / "tmp" / "half").mkdir()
    (store.path / "tmp" / "half" / "blob").write_bytes(b"x")
    (store.path / "tmp" / "file").write_bytes(b"x")
    (store.path / "blobs" / ("0" * 64 + ".safetensors")).write_bytes(b"x")
    (store.path / "signatures" / ("0" * 32 + ".json")).write_bytes(b"x")
    Store.open(store.path, writable=True)  # opening alone is no writer's right to delete
    assert (store.path / "tmp" / "half" / "blob").exists()
    with store.writing():
        pass
    assert list((store.path / "tmp").iterdir()) == []
    assert len(list((store.path / "blobs").iterdir())) == 1
    assert len(list((store.path / "signatures").iterdir())) == 1
    assert store.models() == {"m": record}


def test_one_writer_at_a_time_and_the_lock_dies_with_its_holder(store: Store) -> None:
    script = (
        "import sys; from pathlib import Path; from understudyd.store.store import Store\n"
        "with Store.open(Path(sys.argv[1]), writable=True).writing():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(store.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match=f"process {holder.pid} is writing") as caught, store.writing():
            pass
        assert code_of(caught) == "store_locked"
        assert store.models() == {}  # reading needs no lock
        holder.kill()
    add(store, "m", b"a")
