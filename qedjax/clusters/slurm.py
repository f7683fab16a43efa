"""A run on GPU nodes under Slurm: the batch script, which asks for its own next turn when its time is over.

One process a node drives all GPUs of the node: the data are read and packed once a node, and one rollout engine has them all.
"""

import pathlib
import shlex
from collections.abc import Sequence

BODY = pathlib.Path(__file__).with_suffix('.sh')
NOTICE = 300  # seconds before the time limit at which the processes are told to end
PATIENCE = 240  # seconds that they have for it


def script(name: str, command: Sequence[str], *, nodes: int, gpus: int, time: str, logs: str, options: Sequence[str] = ()) -> str:
    """The batch script.

    Args:
      name: of the job.
      command: of each process, python first.
      nodes, gpus: nodes, and GPUs of each.
      time: limit of one turn, as sbatch takes it.
      logs: folder, which must exist before the job starts.
      options: more options of sbatch; they count where they contradict those here.
    """
    settings = [f'--job-name={name}', f'--nodes={nodes}', '--ntasks-per-node=1', f'--gpus-per-node={gpus}', '--exclusive', '--mem=0',
                f'--time={time}', '--requeue', f'--signal=B:USR1@{NOTICE}', '--export=ALL', f'--output={logs}/%x-%j.log',
                '--open-mode=append', *options]
    variables = {'devices': ','.join(map(str, range(gpus))), 'logs': shlex.quote(logs), 'patience': PATIENCE,
                 'command': f'({shlex.join(command)})'}
    return '\n'.join(['#!/usr/bin/env bash', *(f'#SBATCH {setting}' for setting in settings), '',
                      *(f'{key}={value}' for key, value in variables.items()), '', BODY.read_text()])
