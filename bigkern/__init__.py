"""bigkern: hand-written CUDA and Triton kernels for PyTorch, as drop-in functions and layers."""

from bigkern import nn, ops
from bigkern.backend import Availability, BackendError, backends, use_backend

__version__ = "0.1.0"
__all__ = ["Availability", "BackendError", "backends", "nn", "ops", "use_backend"]
