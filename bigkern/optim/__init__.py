"""Optimizers with the constructors, param-group keys and state of torch.optim's, one launch a step; and clipping."""

from bigkern.optim._convert import convert
from bigkern.optim.adam import Adam, AdamW
from bigkern.optim.clip import clip_grad_norm_
from bigkern.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "clip_grad_norm_", "convert"]
