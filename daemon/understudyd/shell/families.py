"""Which models share a shape, so that one warm-up serves them all."""

from collections.abc import Iterable

from understudyd.store.records import ModelRecord


def family(model: ModelRecord) -> tuple[str, ...]:
    """Pipeline class and signatures: equal for every fine-tune of an architecture."""
    return (model.pipeline_class, *(c.signature for c in model.components))


def representatives(models: Iterable[ModelRecord]) -> list[ModelRecord]:
    """The first model of each family."""
    firsts: dict[tuple[str, ...], ModelRecord] = {}
    for model in models:
        firsts.setdefault(family(model), model)
    return list(firsts.values())
