"""A torch optimizer in the middle of its work goes on as bigkern's."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

from bigkern.optim._optimizer import Optimizer
from bigkern.optim.adam import Adam, AdamW
from bigkern.optim.sgd import SGD

_OURS: dict[type[torch.optim.Optimizer], type[Optimizer]] = {
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.SGD: SGD,
}


def convert(optimizer: torch.optim.Optimizer) -> Optimizer:
    """Make a torch.optim.Adam, AdamW or SGD bigkern's, in place, and return it: the same object.

    It keeps its param groups, hyperparameters, state and hooks, so the next step goes on where the last one ended; and
    since it is the same object, schedulers, GradScaler and training loops that hold it follow it unasked.  It may be
    converted at any time, before the first step or after; what it saves torch.optim loads, and the other way round.
    An optimizer of bigkern's is returned as it is.

    Raises:
        TypeError: another optimizer, or a subclass of one of these, whose step may differ.  It is as it was then.

    Example::

        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
        bigkern.optim.convert(optimizer)  # the scheduler goes on with it
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    ours = _OURS.get(type(optimizer))
    if ours is None:
        raise TypeError(
            f"convert: optimizer is a {type(optimizer).__module__}.{type(optimizer).__qualname__}; supported are "
            f"{', '.join(f'torch.optim.{kind.__name__}' for kind in _OURS)}, and no subclasses, whose step may differ"
        )
    tracked = "step" in vars(optimizer)
    if tracked and getattr(optimizer.step, "__wrapped__", None) is not type(optimizer).step:
        raise TypeError(
            "convert: optimizer.step was replaced on this instance, by something other than a learning rate scheduler; "
            "convert the optimizer first"
        )
    # What bigkern's optimizers have beyond torch's, at its default; making one also readies the class's step for hooks.
    template = ours([torch.empty(0)])
    added = {name: value for name, value in vars(template).items() if name not in vars(optimizer)}
    optimizer.__class__ = ours
    optimizer.__dict__.update(added)
    optimizer._zero_grad_profile_name = template._zero_grad_profile_name
    optimizer._reset()
    if tracked:
        _track(optimizer)
    return optimizer


def _track(optimizer: Optimizer) -> None:
    """A scheduler has put a step of its own before torch's, to see whether it is called; now it is before bigkern's."""
    reference = weakref.ref(optimizer)

    @functools.wraps(type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        found = reference()
        found._opt_called = True
        return type(found).step(found, *args, **kwargs)

    step._wrapped_by_lr_sched = True
    optimizer.step = step
