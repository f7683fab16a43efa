"""A run on all workers of a TPU VM slice: the shell script that starts it there, watches it, and starts it again after a preemption.

The script is tpu_vm.sh below the variables that it reads. It is to be run where gcloud is; a run under way does not depend on it.
"""

import pathlib
import shlex
from collections.abc import Mapping, Sequence

from qedjax.clusters.slices import Slice

BODY = pathlib.Path(__file__).with_suffix('.sh')


def script(name: str, tpu: Slice, command: Sequence[str], *, zone: str, commit: str, project: str = '', create: bool = False,
           spot: bool = False, secrets: Sequence[str] = (), prepare: str = ':', logs: str = 'logs', restarts: int = 10,
           poll: int = 60) -> str:
    """The shell script.

    Args:
      name: of the slice, and of its queued resource.
      tpu: what it is.
      command: what python runs on every worker.
      zone, project: where; no project is gcloud's own.
      commit: of this repository, which is sent.
      create: whether to make the slice where there is none, and again when it was taken; spot: as one that may be taken.
      secrets: names of variables that the workers get from the environment of the script.
      prepare: shell text that every worker runs before a start: it mounts a disk, say, may be run again, and ends with status 0.
      logs: folder of the logs on the workers, in ~/qedjax unless it is absolute.
      restarts: starts after a process failed, until the script gives up.
      poll: seconds from one look to the next.
    """
    place = [f'--zone={zone}', *([f'--project={project}'] if project else [])]
    kind = [f'--accelerator-type={tpu.accelerator_type}', f'--runtime-version={tpu.runtime}', *(['--spot'] if spot else [])]
    variables: Mapping[str, str | Sequence[str]] = {
        'tpu': name, 'place': place, 'kind': kind, 'create': 'yes' if create else 'no', 'commit': commit, 'command': command,
        'secrets': secrets, 'prepare': prepare, 'logs': logs, 'restarts': str(restarts), 'poll': str(poll)}
    return '\n'.join(['#!/usr/bin/env bash', *(f'{key}={_value(value)}' for key, value in variables.items()), '', BODY.read_text()])


def _value(value: str | Sequence[str]) -> str:
    return shlex.quote(value) if isinstance(value, str) else f'({shlex.join(value)})'
