"""bigkern: hand-written CUDA and Triton kernels for PyTorch, as drop-in functions and layers."""

from bigkern import nn, ops, optim
from bigkern.backend import Availability, BackendError, backends, use_backend

__version__ = "0.1.0"
__all__ = ["Availability", "BackendError", "accelerate", "backends", "nn", "ops", "optim", "selfcheck", "use_backend"]


def accelerate(model, *, only=None, skip=None, fuse=True):
    """Make the layers of ``model`` bigkern's, in place, and return the :class:`bigkern.acceleration.Report`.

    Arguments as :func:`bigkern.acceleration.accelerate`, which is imported when it is called.
    """
    from bigkern.acceleration import accelerate

    return accelerate(model, only=only, skip=skip, fuse=fuse)


def selfcheck(*args, **kwargs):
    """Run every op of every available backend here against float64; quarantine what fails and return the report.

    Arguments as :func:`bigkern.tools.selfcheck.selfcheck`, which is imported when it is called.
    """
    from bigkern.tools.selfcheck import selfcheck

    return selfcheck(*args, **kwargs)
