"""The command ``bigkern``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

# Each module has add_arguments(parser) and main(args) -> exit status, and is imported when its command is called:
# `bigkern --help` must not wait for torch.
COMMANDS = {
    "info": ("bigkern.tools.info", "versions, the GPU, what is built, and each backend with its reason"),
    "selfcheck": ("bigkern.tools.selfcheck", "run every op of every backend here against float64"),
    "accuracy": ("bigkern.tools.accuracy", "error against float64 beside torch's own, per op, dtype and backend"),
    "demo": ("bigkern.training.demo", "train the models on real data and compare them with torch.nn's"),
    "train": ("bigkern.training.train", "train a model on digits, text or your own data"),
    "evaluate": ("bigkern.training.evaluate", "accuracy of a trained model"),
    "predict": ("bigkern.training.predict", "what a trained model says of an image or a text"),
}

_BAD_INPUT = 2
_INTERRUPTED = 130  # what a shell reports for Ctrl-C


class _Parser(argparse.ArgumentParser):
    """argparse prints its whole usage before an error; one line is easier to find."""

    def error(self, message: str) -> NoReturn:
        self.exit(_BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import bigkern

        print(f"bigkern {bigkern.__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 2, with one line on standard error, for what cannot be used."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="bigkern", description="CUDA and Triton kernels for PyTorch, and models built from them.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=_Parser)
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, (_, text) in COMMANDS.items()}
    called = next((word for word in argv if not word.startswith("-")), None)
    if called not in COMMANDS:
        parser.parse_args(argv)  # prints help, the version, or what is wrong, and exits
        raise AssertionError("parse_args returned without a command")
    try:
        _check_environment()
        module = importlib.import_module(COMMANDS[called][0])
        module.add_arguments(parsers[called])
        return module.main(parser.parse_args(argv))
    except KeyboardInterrupt:
        print(f"bigkern {called}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has seen enough; keep Python's last flush from complaining.
        sys.stdout = None
        return 0
    except Exception as error:
        if not _is_bad_input(error):
            raise
        print(f"bigkern {called}: {' '.join(str(error).split())}", file=sys.stderr)
        return _BAD_INPUT


def _check_environment() -> None:
    """Refuses an unknown BIGKERN_BACKEND before any work, not at the first layer that reads it."""
    from bigkern import backend
    from bigkern.training.errors import InputError

    try:
        backend.requested()
    except ValueError as error:
        raise InputError(str(error)) from error


def _is_bad_input(error: Exception) -> bool:
    """Whether the user can mend this: input we refuse, a file the system refuses, a backend that cannot serve."""
    from bigkern.backend import BackendError
    from bigkern.training.errors import InputError

    return isinstance(error, (InputError, BackendError)) or (isinstance(error, OSError) and error.filename is not None)
