"""Models and adapters made by hand in a store, without torch: a few weights, and factors that change them."""

from store_kit import plain_draft
from understudyd.store.adapters.records import (
    AdapterRecord,
    BaseRecord,
    TargetRecord,
    content_id,
    structure_id,
)
from understudyd.store.blob_writer import write_blob
from understudyd.store.records import ModelRecord, SignatureRecord, TensorRecord
from understudyd.store.safetensors_file import plan_blob
from understudyd.store.store import Store
from understudyd.store.writer import AdapterDraft

FAMILY = "StableDiffusionLoraLoaderMixin"
RANK = 2


def signature(width: int = 4, weights: int = 3) -> SignatureRecord:
    """`w0`, `w1`, ...: square weights of this width in float32."""
    layout = plan_blob([(f"w{i}.weight", "F32", (width, width)) for i in range(weights)])
    return SignatureRecord(
        id=f"{width:016x}{weights:016x}",
        library="diffusers",
        class_name="UNet2DConditionModel",
        config={"width": width},
        size_bytes=layout.size_bytes,
        tensors=tuple(_tensor(span) for span in layout.tensors if not span.is_padding),
    )


def add_model(
    store: Store,
    name: str,
    content: bytes = b"b",
    *,
    width: int = 4,
    text: bool = True,
    replace: bool = False,
) -> ModelRecord:
    """A model of a UNet, and of a text encoder that every model shares."""
    shapes = {"text_encoder": (signature(8), b"t")} if text else {}
    shapes |= {"unet": (signature(width), content)}
    with store.writing() as writer:
        return writer.publish(plain_draft(writer, name, shapes), replace=replace)


def add_adapter(
    store: Store,
    name: str,
    content: bytes = b"a",
    *,
    width: int = 4,
    base: str = "",
    components: tuple[str, ...] = ("unet",),
    alpha: float = 2.0,
    replace: bool = False,
) -> AdapterRecord:
    """An adapter that changes the first two weights of each component."""
    shapes = {"unet": signature(width), "text_encoder": signature(8)}
    changed = [(part, t) for part in components for t in shapes[part].tensors[:2]]
    layout = plan_blob(
        (f"{part}.{t.path}.{end}", "F32", (RANK, t.shape[1]) if end == "A" else (t.shape[0], RANK))
        for part, t in changed
        for end in "AB"
    )
    with store.writing() as writer:
        workspace = writer.workspace()
        path = workspace / "adapter.safetensors"
        blob = write_blob(path, layout, lambda span: memoryview(content * span.size_bytes))
        spans = {span.name: _tensor(span) for span in layout.tensors if not span.is_padding}
        targets = tuple(
            TargetRecord(
                component=part, path=t.path, kind="linear", shape=t.shape, rank=RANK, alpha=alpha,
                down=spans[f"{part}.{t.path}.A"], up=spans[f"{part}.{t.path}.B"],
            )
            for part, t in changed
        )  # fmt: skip
        record = AdapterRecord(
            name=name,
            family=FAMILY,
            bases=tuple(
                BaseRecord(
                    component=part, class_name=shapes[part].class_name, structure=structure_id(shapes[part])
                )
                for part in components
            ),
            base_model=base,
            targets=targets,
            blob=blob,
            content=content_id(targets, blob),
        )
        folder = workspace / "adapter"
        folder.mkdir()
        return writer.publish_adapter(AdapterDraft(record, path, folder), replace=replace)


def remove_adapter(store: Store, name: str) -> None:
    with store.writing() as writer:
        writer.remove_adapter(name)


def _tensor(span: object) -> TensorRecord:
    return TensorRecord(
        path=span.name,  # type: ignore[attr-defined]
        kind="parameter",
        dtype=span.dtype,  # type: ignore[attr-defined]
        shape=span.shape,  # type: ignore[attr-defined]
        offset=span.begin,  # type: ignore[attr-defined]
        size_bytes=span.size_bytes,  # type: ignore[attr-defined]
    )
