"""What has been compiled so far, for status, metrics and tests. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CompileReport:
    """Counts since the stage was made.

    `graphs` were compiled, which took `compile_s` of a thread beside the stage. `recompiles` of these were
    made for calls that nothing compiled before fitted, of signatures that were ready. `pending` jobs wait or
    run. `failures` says by component class why it is served uncompiled.
    """

    graphs: int = 0
    compile_s: float = 0.0
    recompiles: int = 0
    pending: int = 0
    failures: Mapping[str, str] = field(default_factory=dict)
