"""The schedulers that a request may put in the place of its model's own.

Allowed is what diffusers calls compatible, from either side: the list that the class of the model's scheduler
keeps, or the other one's. LCM and TCD keep none, but its documentation has them follow all that Euler may.
"""

import functools
from collections.abc import Mapping
from typing import Any

from diffusers import schedulers as library
from diffusers.schedulers import SchedulerMixin

from understudyd.stage.errors import BadRequest

ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_sde": ("DPMSolverSinglestepScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
"""Short names: the class, and what its configuration changes. The table of diffusers' documentation."""


def own_scheduler(template: Any) -> Any:
    """A fresh scheduler of the template's config, as `from_pretrained` would have made it."""
    return type(template).from_config(template.config)


def other_scheduler(template: Any, name: str) -> Any:
    """A fresh scheduler of another class, as users of diffusers make it. Raises `BadRequest`."""
    class_name, changes = ALIASES.get(name.lower(), (name, {}))
    allowed = allowed_schedulers(type(template).__name__)
    if class_name not in allowed:
        short = [alias for alias, (target, _) in ALIASES.items() if target in allowed]
        raise BadRequest(
            f"scheduler {name!r:.60} does not go with {type(template).__name__}; "
            f"use one of {', '.join(short or sorted(allowed))}"
        )
    return allowed[class_name].from_config(template.config, **changes)


@functools.cache
def allowed_schedulers(class_name: str) -> Mapping[str, type[Any]]:
    """What may replace a scheduler of this class, by class name."""
    every = {each.__name__: each for each in _every_scheduler()}
    own = every.get(class_name)
    named = {class_name, *(own._compatibles if own is not None else ())}
    if "EulerDiscreteScheduler" in named:
        named |= {"LCMScheduler", "TCDScheduler"}
    return {name: each for name, each in every.items() if name in named or class_name in each._compatibles}


@functools.cache
def _every_scheduler() -> tuple[type[Any], ...]:
    """Those of this installation that step; a class whose library is missing is a dummy of another kind."""
    found = (getattr(library, name, None) for name in dir(library))
    return tuple(
        each
        for each in found
        if isinstance(each, type) and issubclass(each, SchedulerMixin) and hasattr(each, "step")
    )
