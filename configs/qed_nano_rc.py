"""RL with the reasoning cache on FineProofs-RL: the third stage of QED-Nano (arXiv 2604.04898).

python launch/rl.py --config=configs/qed_nano_rc.py:v5p-64 --config.init=runs/rl --workdir=/mnt/shared/rc --distributed \\
    --config.judge.remote.base_url=http://GRADER:8000/v1 --config.chains.summariser.base_url=http://SUMMARISER:8000/v1

The argument is the hardware, which changes no number of the recipe; `init` is the RL run. Reference settings: chains of 3 turns of at most
49,152 tokens at temperature 0.8, summarised in at most 2,048 tokens by a frozen Qwen3-4B-Instruct-2507 at temperature 0.7, top-p 0.8,
top-k 20; 2 states a problem, the empty one included; 16 answers a state, 64 states a step, about 25 steps; otherwise as
configs/qed_nano_rl.py, whose departures hold here too.

Where we depart from it: every turn asks for a proof, in the words in which the judge's problem is put; states are those before each of the
three turns, so the third turn, whose summary would be read by none, is not sampled. The reference's public code has no replay buffer;
`--config.chains.replay=2048` turns ours on.

Plans: `python tools/plan.py --config=configs/qed_nano_rc.py:HARDWARE --topology=SLICE`, compiled by libtpu 0.0.42.1 or (*) estimated.
Times are at the roofline, with every answer at its full length:

    hardware  slice      peak of HBM      executed/model  update, MFU     in flight  tokens/s  step        the run
    v5p-64    v5p:4x4x4  83.14 of 95 GiB  1.21            160.383 s, 82%  525        45,811    1,327.73 s  0.38 days = 590 chip-hours
    v6e-64    v6e:8x8    27.75 of 32 GiB  1.44            95.068 s, 70%   74         22,664    2,454.66 s  0.71 days = 1,091 chip-hours
    v5e-256   v5e:16x16  14.06 of 16 GiB  1.44            110.785 s, 70%  105        33,696    1,697.82 s  0.49 days = 3,018 chip-hours
    h100-8 *  h100:8     61.23 of 80 GiB  1.42            696.407 s, 71%  37         6,964     8,375.26 s  2.42 days = 465 chip-hours

Never run by us at this size; docs/reasoning_cache.md has what was measured.
"""

from qedjax.data.sources import Source
from qedjax.grading.judge import JudgeConfig
from qedjax.llm.remote import RemoteConfig
from qedjax.model.config import ModelConfig
from qedjax.reasoning_cache.decoder import PhaseConfig, RCConfig
from qedjax.rl.chains import ChainsConfig
from qedjax.rl.config import EvaluationConfig, RLConfig
from qedjax.rl.losses import ObjectiveConfig
from qedjax.rl.problems import ProblemsConfig
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig

COLUMNS = 'rubric=rubrics,difficulty=reward_mean'
SUMMARISER = RemoteConfig('http://localhost:8001/v1', 'Qwen/Qwen3-4B-Instruct-2507', concurrency=256)

# Sizes of the engine are those of one host: 4 chips of a TPU slice, 8 GPUs.
HARDWARE = {
    'v5p-64': {'fsdp': 16, 'context': 4, 'micro_rows': 16, 'remat': 'attention', 'attention': ('splash', 'ragged'),
               'tensor': 4, 'slots': 64, 'cache_tokens': 1_638_400},
    'v6e-64': {'fsdp': 8, 'context': 8, 'micro_rows': 8, 'remat': 'full', 'attention': ('splash', 'ragged'),
               'tensor': 4, 'slots': 16, 'cache_tokens': 229_376},
    'v5e-256': {'fsdp': 16, 'context': 16, 'micro_rows': 16, 'remat': 'full', 'attention': ('splash', 'ragged'),
                'tensor': 4, 'slots': 4, 'cache_tokens': 81_920},
    'h100-8': {'fsdp': 8, 'context': 1, 'micro_rows': 8, 'remat': 'full', 'attention': ('cudnn', 'xla'),
               'tensor': 8, 'slots': 128, 'cache_tokens': 1_835_008},
}


def get_config(hardware: str = 'v5p-64') -> RLConfig:
    if hardware not in HARDWARE:
        raise ValueError(f'{hardware!r} is no hardware of this config: choose one of {", ".join(HARDWARE)}; --config.init names the policy')
    on = HARDWARE[hardware]
    attention, paged = on['attention']
    return RLConfig(
        init='runs/rl',
        model=ModelConfig(param_dtype='float32', dtype='bfloat16', attention=attention, remat=on['remat'], paged_attention=paged),
        train=Source('hub:lm-provers/FineProofs-RL', columns=COLUMNS),
        problems=ProblemsConfig(max_prompt=768, least=0.0, most=0.99),
        chains=ChainsConfig(2, RCConfig(3, PhaseConfig(49_152, 0.8), PhaseConfig(2048, 0.7, 0.8, 20)), summariser=SUMMARISER),
        grader='judge',
        judge=JudgeConfig(remote=RemoteConfig('http://localhost:8000/v1', 'openai/gpt-oss-20b', 'responses', effort='medium')),
        group_size=16,
        groups=64,
        steps=25,
        temperature=0.8,
        max_tokens=49_152,
        max_lag=5,
        in_flight=64,
        objective=ObjectiveConfig(ratio_cap=10.0),
        mesh=MeshConfig(fsdp=on['fsdp'], context=on['context']),
        engine=EngineConfig(slots=on['slots'], staged=on['slots'] // 4, page_size=128, cache_tokens=on['cache_tokens'], steps=32,
                            prefill_tokens=2048),
        tensor=on['tensor'],
        row_length=53_248,
        micro_rows=on['micro_rows'],
        evaluation=EvaluationConfig(Source('hub:lm-provers/FineProofs-RL-test', columns=COLUMNS, split='test'), every=12,
                                    temperature=0.8, top_p=0.95, top_k=20),
        save_every=5,
        keep=5,
    )
