"""Reinforcement learning with rubric rewards.

python launch/rl.py --config=configs/derivations_rl.py:runs/quickstart --workdir=runs/rl [--config.optimizer.learning_rate=1e-5 ...]

Started again with the same workdir, it resumes from the newest complete checkpoint; what the judge has marked is not paid for again
(of several processes each keeps what its own judge was paid for).
Where there are several hosts, start it on each of them, with --distributed and a workdir that all of them see: each samples and grades a
share of every step's groups, and all make the update together.
"""

from absl import flags
from ml_collections import config_flags

from qedjax import cli, processes
from qedjax.rl import loop

CONFIG = config_flags.DEFINE_config_file('config', None, 'File with get_config(); --config.NAME=VALUE overrides a field.',
                                         lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints, metrics, samples and the resolved config.', required=True)
OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Delete the checkpoints that the workdir holds and start anew.')
DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the other hosts of a TPU pod, or of a Slurm or MPI job.')


def main(_) -> None:
    if CONFIG.value is None:
        raise ValueError('no --config: name one of configs/*_rl.py, e.g. --config=configs/derivations_rl.py:runs/quickstart')
    if DISTRIBUTED.value:
        processes.join()
    loop.train(CONFIG.value, WORKDIR.value, mode='overwrite' if OVERWRITE.value else 'resume')


if __name__ == '__main__':
    cli.run(main)
