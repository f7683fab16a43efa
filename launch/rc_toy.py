"""The reasoning cache on a toy: SFT, RL and RL from states of chains on derivations too long for one answer, and a curve over turns.

python launch/rc_toy.py --workdir=runs/rc_toy

Two CPU cores, about a quarter of an hour. Started again after an interruption, it goes on where it was.
"""

from absl import flags
from ml_collections import config_flags

from qedjax import cli, rc_toy

CONFIG = config_flags.DEFINE_config_dataclass('config', rc_toy.ToyConfig(), 'Sizes, e.g. --config.problems=32.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for data, checkpoints and the plot.', required=True)


def main(_) -> None:
    rc_toy.run(CONFIG.value, WORKDIR.value)


if __name__ == '__main__':
    cli.run(main)
