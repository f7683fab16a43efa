"""Submits a launch script to GPU nodes under Slurm; it asks for its next turn at the time limit and goes on from its workdir.

python launch/slurm.py --name=sft --nodes=4 --gpus=8 --time=24:00:00 --env=HF_TOKEN --option=--partition=gpu \\
    -- launch/sft.py --config=configs/qed_nano_sft.py:h100-8 --config.init=MODEL --workdir=/shared/sft \
    --config.mesh.fsdp=32 --config.accumulation=1

To be started on a login node, from a clone on a disk that the nodes see, with the python of the environment that the job is to have.
docs/gpu.md is the whole way.
"""

import pathlib
import re
import subprocess
import sys

from absl import flags

from qedjax import cli
from qedjax.clusters import command, slurm

NAME = flags.DEFINE_string('name', None, 'Name of the job.', required=True)
NODES = flags.DEFINE_integer('nodes', 1, 'Nodes, each taken whole.', lower_bound=1)
GPUS = flags.DEFINE_integer('gpus', 8, 'GPUs of a node.', lower_bound=1)
TIME = flags.DEFINE_string('time', None, 'Limit of one turn, as sbatch takes it, e.g. 24:00:00.', required=True)
ENV = flags.DEFINE_list('env', [], 'Names of variables that must be set here; the job gets all of this environment.')
LOGS = flags.DEFINE_string('logs', 'logs', 'Folder of the logs; made here if absent.')
OPTION = flags.DEFINE_multi_string('option', [], 'One more option of sbatch, e.g. --option=--partition=gpu; may be repeated.')
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print the batch script that would be submitted, and do nothing.')


def main(argv: list[str]) -> None:
    command.require_name(NAME.value)
    run = command.script_command(argv[1:], NODES.value)
    command.require_environment(ENV.value)
    if not re.fullmatch(r'\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}', TIME.value):
        raise ValueError(f'--time={TIME.value} must read as sbatch takes it: minutes, HH:MM:SS or DAYS-HH')
    for option in [f'--logs={LOGS.value}', *OPTION.value]:
        if not re.fullmatch(r'-[^\s\'"\\%]+', option):
            raise ValueError(f'{option!r} must be one word for sbatch that begins with a dash, without quotes, backslashes and %')
    text = slurm.script(NAME.value, [sys.executable, *run], nodes=NODES.value, gpus=GPUS.value, time=TIME.value, logs=LOGS.value,
                        options=OPTION.value)
    if DRY_RUN.value:
        print(text, end='')
        return
    pathlib.Path(LOGS.value).mkdir(parents=True, exist_ok=True)
    sys.exit(subprocess.run(['sbatch'], input=text, text=True, check=False).returncode)


if __name__ == '__main__':
    cli.run(main, words=True)
