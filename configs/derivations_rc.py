"""RL from states of the reasoning cache, on derivations too long for one answer: the RC stage of the quickstart, to play with.

python launch/quickstart.py --workdir=runs/quickstart
python launch/rl.py --config=configs/derivations_rc.py:runs/quickstart --workdir=runs/rc

Two CPU cores; docs/reasoning_cache.md has what it brings.
"""

from qedjax.quickstart import QuickstartConfig, rc_config
from qedjax.rl.config import RLConfig


def get_config(folder: str = 'runs/quickstart') -> RLConfig:
    return rc_config(QuickstartConfig(), folder)
