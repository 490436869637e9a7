"""The base class of a custom pipeline."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from understudyd.pipelines.request import Request

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn


class CustomPipeline(ABC):
    """Derive from this. An object is made for each request, around components that all requests share.

    `options` declares the arguments that clients may send besides a request's own fields: name -> default
    value, or name -> type (`bool`, `int`, `float`, `str`, `list`) where the default is None. `inputs` names
    the images that a client may send.
    """

    options: ClassVar[Mapping[str, Any]] = {}
    inputs: ClassVar[Sequence[str]] = ()

    @classmethod
    @abstractmethod
    def components(cls, config: dict[str, Any]) -> "Mapping[str, Callable[[], nn.Module]]":
        """How to build each component, by name; `config` is the model folder's config.json, or empty.

        A builder makes the architecture only. It is called on the CPU when a model is added, and once per
        architecture (not per model) in the daemon, there on the meta device: shapes may depend on `config`
        and on nothing else, and no tensor's value may be looked at.
        """

    @classmethod  # noqa: B027  most classes need none
    def on_startup(cls) -> None:
        """Called once in the life of a daemon, before anything else of the class there.

        If a model of the class is in the store, that is before the daemon is ready. When it raises, the
        class's models fail, and nothing else does.
        """

    @classmethod
    def read_files(cls, folder: Path, config: dict[str, Any]) -> Any:
        """Make what a model's small files are for, a tokenizer perhaps; called once per model.

        Its requests share the result, two at a time.
        """
        return None

    def __init__(self, components: "Mapping[str, nn.Module]", files: Any, config: dict[str, Any]) -> None:
        """`files` is what `read_files` gave. Called off the stage: no weights may be read yet."""
        self.modules = components
        self.files = files
        self.config = config

    def prepare(self, request: Request) -> None:  # noqa: B027  most classes need none
        """What needs no weights: check the request (raise `Refused`), tokenise, resize inputs.

        Another request computes meanwhile, so what is done here costs the stage nothing.
        """

    @abstractmethod
    def __call__(self, request: Request) -> "Sequence[Image.Image] | Tensor":
        """Compute, on the stage, the weights in place, without gradients; call `request.step` between steps.

        Gives PIL images or a tensor of shape [images, 3, height, width], 0 to 1.
        """
