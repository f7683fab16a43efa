"""RL of the quickstart's model on derivations, graded by rule: the RL stage of the quickstart, to play with.

python launch/quickstart.py --workdir=runs/quickstart
python launch/rl.py --config=configs/derivations_rl.py:runs/quickstart --workdir=runs/rl

Two CPU cores; docs/measurements.md has what it brings.
"""

from qedjax.quickstart import QuickstartConfig, rl_config
from qedjax.rl.config import RLConfig


def get_config(folder: str = 'runs/quickstart') -> RLConfig:
    return rl_config(QuickstartConfig(), folder)
