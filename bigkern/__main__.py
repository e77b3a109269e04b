"""``python -m bigkern``: the command ``bigkern``."""

import sys

from bigkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
