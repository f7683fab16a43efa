"""RL of the quickstart's model with a judge behind HTTP instead of the rule: the whole path of a judged run, without a language model.

python launch/quickstart.py --workdir=runs/quickstart
python tools/scripted_judge.py --port=8001 --faults=0.3
python launch/rl.py --config=configs/derivations_judge_rl.py:runs/quickstart,http://127.0.0.1:8001/v1 --workdir=runs/judged

Two CPU cores. The address may be that of any server that speaks OpenAI's chat API: a real model as the judge of derivations.
"""

import dataclasses

from qedjax.grading.judge import JudgeConfig
from qedjax.llm.remote import RemoteConfig
from qedjax.quickstart import QuickstartConfig, rl_config
from qedjax.rl.config import RLConfig


def get_config(where: str = 'runs/quickstart,http://127.0.0.1:8001/v1') -> RLConfig:
    folder, base_url = where.split(',')
    remote = RemoteConfig(base_url, 'judge', timeout=20.0, first_wait=0.2)
    return dataclasses.replace(rl_config(QuickstartConfig(), folder), grader='judge', judge=JudgeConfig(remote, max_tokens=1024, tries=3))
