"""RL with rubric rewards on FineProofs-RL: the second stage of QED-Nano (arXiv 2604.04898).

python launch/rl.py --config=configs/qed_nano_rl.py:v5p-64 --config.init=runs/sft --workdir=/mnt/shared/rl --distributed \\
    --config.judge.remote.base_url=http://GRADER:8000/v1

The argument is the hardware, which changes no number of the recipe; `init` is the SFT run (the reference starts from its third epoch).
Reference settings: 64 problems x 16 answers of at most 49,152 tokens a step at temperature 0.8, 150 steps; advantages centred in the group;
PPO with eps 4 on token sums over the sample count, entropy 1e-4, no KL; AdamW at a constant 1e-6, weight decay 0.01, gradient norm clipped
to 0.3. The grader is gpt-oss-20b at medium effort and temperature 1 through the responses API.

Where we depart from it: problems that 128 answers never or always solved are left out (3% and 2% of the file); a ratio of log-probs
counts at most tenfold where the advantage is negative (the reference bounds it for positive ones alone); groups with a token more than 5
versions old are dropped (the reference has no bound); an answer that the grader could not grade leaves the group (there it counts 0).

Plans: `python tools/plan.py --config=configs/qed_nano_rl.py:HARDWARE --topology=SLICE`, compiled by libtpu 0.0.42.1 or (*) estimated.
Times are at the roofline, with every answer at its full length:

    hardware  slice      peak of HBM      executed/model  update, MFU     in flight  tokens/s  step        the run
    v5p-64    v5p:4x4x4  84.28 of 95 GiB  1.22            145.322 s, 82%  551        45,896    1,241.96 s  2.16 days = 3,312 chip-hours
    v6e-64    v6e:8x8    28.39 of 32 GiB  1.45            85.882 s, 69%   84         23,221    2,253.38 s  3.91 days = 6,009 chip-hours
    v5e-256   v5e:16x16  13.83 of 16 GiB  1.45            100.106 s, 69%  126        36,096    1,494.49 s  2.59 days = 15,941 chip-hours
    h100-8 *  h100:8     60.11 of 80 GiB  1.41            624.347 s, 71%  37         6,964     7,851.50 s  13.63 days = 2,617 chip-hours

Never run by us at this size; docs/measurements.md has what was measured.
"""

from qedjax.data.sources import Source
from qedjax.grading.judge import JudgeConfig
from qedjax.llm.remote import RemoteConfig
from qedjax.model.config import ModelConfig
from qedjax.prompts import load
from qedjax.rl.config import EvaluationConfig, RLConfig
from qedjax.rl.losses import ObjectiveConfig
from qedjax.rl.problems import ProblemsConfig
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig

COLUMNS = 'rubric=rubrics,difficulty=reward_mean'

# Sizes of the engine are those of one host: 4 chips of a TPU slice, 8 GPUs.
HARDWARE = {
    'v5p-64': {'fsdp': 16, 'context': 4, 'micro_rows': 16, 'remat': 'attention', 'attention': ('splash', 'ragged'),
               'tensor': 4, 'slots': 128, 'cache_tokens': 1_720_320},
    'v6e-64': {'fsdp': 8, 'context': 8, 'micro_rows': 8, 'remat': 'full', 'attention': ('splash', 'ragged'),
               'tensor': 4, 'slots': 16, 'cache_tokens': 262_144},
    'v5e-256': {'fsdp': 16, 'context': 16, 'micro_rows': 16, 'remat': 'full', 'attention': ('splash', 'ragged'),
                'tensor': 4, 'slots': 4, 'cache_tokens': 98_304},
    'h100-8': {'fsdp': 8, 'context': 1, 'micro_rows': 8, 'remat': 'full', 'attention': ('cudnn', 'xla'),
               'tensor': 8, 'slots': 128, 'cache_tokens': 1_835_008},
}


def get_config(hardware: str = 'v5p-64') -> RLConfig:
    if hardware not in HARDWARE:
        raise ValueError(f'{hardware!r} is no hardware of this config: choose one of {", ".join(HARDWARE)}; --config.init names the policy')
    on = HARDWARE[hardware]
    attention, paged = on['attention']
    return RLConfig(
        init='runs/sft',
        model=ModelConfig(param_dtype='float32', dtype='bfloat16', attention=attention, remat=on['remat'], paged_attention=paged),
        train=Source('hub:lm-provers/FineProofs-RL', columns=COLUMNS),
        problems=ProblemsConfig(prompt=load('prove'), max_prompt=768, least=0.0, most=0.99),
        grader='judge',
        judge=JudgeConfig(remote=RemoteConfig('http://localhost:8000/v1', 'openai/gpt-oss-20b', 'responses', effort='medium')),
        group_size=16,
        groups=64,
        steps=150,
        temperature=0.8,
        max_tokens=49_152,
        max_lag=5,
        in_flight=128,
        objective=ObjectiveConfig(ratio_cap=10.0),
        mesh=MeshConfig(fsdp=on['fsdp'], context=on['context']),
        engine=EngineConfig(slots=on['slots'], staged=on['slots'] // 4, page_size=128, cache_tokens=on['cache_tokens'], steps=32,
                            prefill_tokens=2048),
        tensor=on['tensor'],
        row_length=49_920,
        micro_rows=on['micro_rows'],
        evaluation=EvaluationConfig(Source('hub:lm-provers/FineProofs-RL-test', columns=COLUMNS, split='test'), every=12,
                                    temperature=0.8, top_p=0.95, top_k=20),
        save_every=5,
        keep=5,
    )
