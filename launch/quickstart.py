"""The whole recipe in small, on an embedded family of problems: data, SFT, RL, RL with the reasoning cache, curves over turns, export.

python launch/quickstart.py --workdir=runs/quickstart

Needs no GPU, no network and no data: some ten minutes on two cores. Started again after an interruption, it goes on where it was.
"""

from absl import flags
from ml_collections import config_flags

from qedjax import cli, quickstart

CONFIG = config_flags.DEFINE_config_dataclass('config', quickstart.QuickstartConfig(), 'Sizes, e.g. --config.problems=32.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for data, checkpoints, samples and the exported model.', required=True)


def main(_) -> None:
    quickstart.run(CONFIG.value, WORKDIR.value)


if __name__ == '__main__':
    cli.run(main)
