"""Supervised fine-tuning.

python launch/sft.py --config=configs/smollm2_sft.py --workdir=runs/sft [--config.optimizer.learning_rate=1e-4 ...]

Started again with the same workdir, it resumes from the newest complete checkpoint. Where there are several hosts (a TPU pod,
say), start it on each of them, with --distributed and a workdir that all of them see.
"""

from absl import flags
from ml_collections import config_flags

from qedjax import cli, processes
from qedjax.train import sft

CONFIG = config_flags.DEFINE_config_file('config', None, 'File with get_config(); --config.NAME=VALUE overrides a field.',
                                         lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints, metrics and the resolved config.', required=True)
OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Delete the checkpoints that the workdir holds and start anew.')
DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the other hosts of a TPU pod, or of a Slurm or MPI job.')


def main(_) -> None:
    if CONFIG.value is None:
        raise ValueError('no --config: name one of configs/*.py, e.g. --config=configs/smollm2_sft.py')
    if DISTRIBUTED.value:
        processes.join()
    sft.train(CONFIG.value, WORKDIR.value, mode='overwrite' if OVERWRITE.value else 'resume')


if __name__ == '__main__':
    cli.run(main)
