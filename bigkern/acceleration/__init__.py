"""``accelerate``: the layers of any model become bigkern's, in place, with a report that can undo it."""

from bigkern.acceleration._accelerate import accelerate
from bigkern.acceleration.report import Report, Row
from bigkern.acceleration.verification import Verification, VerificationRow

__all__ = ["Report", "Row", "Verification", "VerificationRow", "accelerate"]
