"""What every command shares: errors that a user can mend end with one sentence and exit code 2, all others with their traceback."""

import logging as stdlib_logging
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, logging

from qedjax.checkpoint.manager import CheckpointError

os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # that torch is not installed: nothing here needs it


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs an absl main function; `error: ...` on stderr and exit code 2 for ValueError, CheckpointError, OSError."""

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f'unexpected argument {argv[1]!r}; flags are written --name=value')
        try:
            main(argv)
        except (ValueError, CheckpointError, OSError, FloatingPointError) as error:
            logging.debug('traceback of the error below', exc_info=True)
            print(f'error: {error}', file=sys.stderr)
            sys.exit(2)

    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(_ours)
    app.run(guarded)


def _ours(record: stdlib_logging.LogRecord) -> bool:
    """Libraries (Orbax above all) may warn, but their running commentary would bury ours."""
    return record.levelno >= stdlib_logging.WARNING or 'site-packages' not in record.pathname
