"""What every command shares: errors that a user can mend end with one sentence and exit code 2, all others with their traceback.

Ctrl-C ends with one sentence and 130, as shells have it, once a checkpoint that is being written is on disk. SIGTERM, with which machines
are taken away, ends a run with a checkpoint and 143: SFT after the step that it is at, RL also while it collects the groups of one.
"""

import logging as stdlib_logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from qedjax.checkpoint.manager import CheckpointError
from qedjax.llm.client import EndpointError
from qedjax.processes import Preempted

os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # that torch is not installed: nothing here needs it


def run(main: Callable[[Sequence[str]], None], *, words: bool = False) -> None:
    """Runs an absl main function; `error: ...` on stderr and exit code 2 for ValueError, CheckpointError, OSError.

    Arguments that are no flags are refused, unless `words`: main then gets those, and all that come after `--`.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1 and not words:
            raise app.UsageError(f'unexpected argument {argv[1]!r}; flags are written --name=value')
        try:
            main(argv)
        except (ValueError, CheckpointError, EndpointError, OSError, FloatingPointError) as error:
            logging.debug('traceback of the error below', exc_info=True)
            _end(error, 2)
        except KeyboardInterrupt:
            _end('interrupted; a run started again goes on from its newest checkpoint', 130)
        except Preempted:
            _end('ended by SIGTERM, and saved; a run started again goes on from here', 143)

    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(_ours)
    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        text = str(error)
        if 'parsing config file' in text:  # its get_config raised; ml_collections puts a traceback around what it says
            text = text.rstrip().splitlines()[-1].partition(': ')[2]
        _end(text, 2)
    except KeyError as error:  # --config.NAME of a field that the config has not
        _end(error.args[0], 2)


def _end(error: object, code: int) -> NoReturn:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(code)


def _ours(record: stdlib_logging.LogRecord) -> bool:
    """Libraries (Orbax above all) may warn, but their running commentary would bury ours."""
    return record.levelno >= stdlib_logging.WARNING or 'site-packages' not in record.pathname
