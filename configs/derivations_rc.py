"""RL from states of the reasoning cache, on derivations of 9 to 14 steps: the last stage of launch/rc_toy.py, to play with.

python launch/rc_toy.py --workdir=runs/rc_toy
python launch/rl.py --config=configs/derivations_rc.py:runs/rc_toy --workdir=runs/rc

Two CPU cores; docs/reasoning_cache.md has what it brings.
"""

from qedjax.rc_toy import ToyConfig, rc_config
from qedjax.rl.config import RLConfig


def get_config(folder: str = 'runs/rc_toy') -> RLConfig:
    return rc_config(ToyConfig(), folder)
