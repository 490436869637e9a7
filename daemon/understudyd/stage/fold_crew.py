"""Who folds: a thread of the stage and, as long as nothing computes, one for every other core.

Each takes whole weights and multiplies them with one thread of torch. Threads of torch's own would wait for
each other in every product, and where something else wants a core too that takes many times as long.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from understudyd.stage.fold_products import FoldProducts
from understudyd.store.adapters.overlays import FoldedWeight


class SharedWeights:
    """Weights that several threads take, each weight once."""

    def __init__(self, weights: Iterable[FoldedWeight]) -> None:
        self._lock = threading.Lock()
        self._left = iter(weights)

    def __iter__(self) -> Iterator[FoldedWeight]:
        """Those that nobody has taken yet."""
        while (weight := self._take()) is not None:
            yield weight

    def stop(self) -> None:
        """Nobody takes another one."""
        with self._lock:
            self._left = iter(())

    def _take(self) -> FoldedWeight | None:
        with self._lock:
            return next(self._left, None)


class FoldCrew:
    """The helpers of the thread that folds, and how all of them multiply. `close` ends them."""

    def __init__(
        self, threads: int = 1, helpers: int = 0, is_busy: Callable[[], bool] = lambda: False
    ) -> None:
        """`threads` are torch's for what it computes otherwise; helpers go home when something `is_busy`."""
        self.products = FoldProducts(threads)
        self._helpers = helpers
        self._is_busy = is_busy
        self._pool = ThreadPoolExecutor(max(1, helpers), "stage-fold-helper")

    @contextlib.contextmanager
    def sharing(
        self, weights: Iterable[FoldedWeight], fold: Callable[[Iterable[FoldedWeight]], Iterable[object]]
    ) -> Iterator[SharedWeights]:
        """Give weights to whoever enters; helpers may take some of them and `fold` them, step by step.

        Nobody folds any more when it is left. Raises what a helper's `fold` did.
        """
        shared = SharedWeights(weights)
        helpers = 0 if self._is_busy() else self._helpers
        tasks = [self._pool.submit(self._help, shared, fold) for _ in range(helpers)]
        try:
            yield shared
        finally:
            shared.stop()
            wait(tasks)
        for task in tasks:
            task.result()

    def close(self) -> None:
        """When no fold is under way."""
        self._pool.shutdown()

    def _help(
        self, shared: SharedWeights, fold: Callable[[Iterable[FoldedWeight]], Iterable[object]]
    ) -> None:
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                for weight in shared:
                    for _ in fold([weight]):
                        pass
                    if self._is_busy():
                        return
        except BaseException:
            shared.stop()
            raise
