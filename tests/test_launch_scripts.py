"""Launchers of other machines, as real processes: what --dry_run prints, and what that does where gcloud, kubectl and Slurm are stubs."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
from absl import flags
from ml_collections import config_flags

from qedjax.clusters import slices
from qedjax.rl.config import RLConfig
from qedjax.rl.config import validate as validate_rl
from qedjax.train.sft import validate

ROOT = pathlib.Path(__file__).parents[1]
SECRET = 'hf_"$(never) seen\''
ODD = ["--config.problems.prompt=it's $HOME `id` \"x\" $(HF_TOKEN) \\ *", '--config.train.path=a b;c']
RUN = ('launch/sft.py', '--config=configs/tiny_sft.py', '--workdir=/mnt/shared/run', *ODD)
STOP = 'kill -TERM -- -$(cat ~/qedjax/pid)'
FLAGS = {
    'tpu_vm': ('--name=qed', '--topology=v6e:4x4', '--zone=us-east5-b', '--create', '--spot', '--poll=1', '--env=HF_TOKEN',
               '--prepare=echo "it\'s ready" >> ~/prepared'),
    'gke': ('--name=qed', '--topology=v5p:2x2x2', '--claim=shared', '--secret=tokens', '--repository=https://host/org/code'),
    'slurm': ('--name=qed', '--nodes=2', '--gpus=4', '--time=1-00:00:00', '--env=HF_TOKEN', '--option=--partition=gpu'),
}

# Google's TPU service with two workers, whose homes are folders; it is told its states, and writes down how it was called.
GCLOUD = '''
import json, os, pathlib, shutil, subprocess, sys
here, arguments = pathlib.Path(os.environ['STUBS']), sys.argv[1:]
with (here / 'calls').open('a') as calls:
    calls.write(json.dumps(arguments) + '\\n')
homes = [here / f'home{worker}' for worker in (0, 1)]
what = arguments[2:4]
if what[1] == 'describe':
    path = here / ('states' if what[0] == 'tpu-vm' else 'requests')
    state, *later = path.read_text().split()
    path.write_text(' '.join(later or [state]))
    sys.exit('ERROR: NOT_FOUND: Resource was not found') if state == 'ABSENT' else print(state)
elif what == ['tpu-vm', 'scp']:
    *sources, target = [argument for argument in arguments[4:] if not argument.startswith('--')]
    for home in homes:
        for source in sources:
            shutil.copy(source, home / target.partition(':')[2])
elif what == ['tpu-vm', 'ssh']:
    options = dict(argument.split('=', 1) for argument in arguments[5:])
    for home in homes if options['--worker'] == 'all' else homes[:1]:
        home.mkdir(exist_ok=True)
        subprocess.run(['bash', '-c', options['--command']], check=True, cwd=home,
                       env={'HOME': str(home), 'PATH': os.environ['PATH'], 'STUBS': str(here)})
elif what == ['queued-resources', 'delete']:
    for home in homes:
        subprocess.run(['flock', home / 'qedjax/lock', 'true'], check=True)
        shutil.rmtree(home)
'''
# The interpreter of a worker or pod: writes down how it was started, and ends as it is told to.
PYTHON = '''
import json, os, pathlib, sys, time
here = pathlib.Path(os.environ['STUBS'])
with (here / 'runs').open('a') as runs:
    runs.write(json.dumps([sys.argv[1:], os.environ.get('HF_TOKEN'), os.environ.get('JAX_LOCAL_DEVICE_IDS'), os.getcwd()]) + '\\n')
print('at work', flush=True)
until, *codes = (here / 'ends').read_text().split()
while until != 'now' and not (here / until).exists():
    time.sleep(0.05)
with (here / ('starts' + pathlib.Path(os.environ['HOME']).name)).open('a+') as starts:  # of this worker
    starts.write('.')
    sys.exit(int(codes[min(starts.tell(), len(codes)) - 1]))
'''
UV = '''#!/bin/sh
if [ "$1" = venv ]; then mkdir -p .venv/bin && cp "$STUBS/bin/interpreter" .venv/bin/python; fi
'''
LINES = '''#!/bin/sh
cat > "$STUBS/stdin"; for word in "$@"; do echo "$word"; done > "$STUBS/words"
'''


@pytest.fixture
def stubs(tmp_path):
    """A folder of commands for PATH, and of what they were told and tell."""
    (tmp_path / 'bin').mkdir()
    shebang = f'#!{sys.executable} -IS\n'
    commands = {'gcloud': shebang + GCLOUD, 'interpreter': shebang + PYTHON, 'python': shebang + PYTHON, 'uv': UV, 'kubectl': LINES,
                'sbatch': LINES}
    for name, text in commands.items():
        (tmp_path / 'bin' / name).write_text(text)
        (tmp_path / 'bin' / name).chmod(0o755)
    (tmp_path / 'ends').write_text('now 0')
    (tmp_path / 'requests').write_text('ABSENT')
    return tmp_path


def environment(stubs=None):
    path = f'{stubs}/bin:{os.environ["PATH"]}' if stubs else os.environ['PATH']
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_TOKEN': SECRET, 'PATH': path, 'STUBS': str(stubs)}


def command(name, *flags, run=RUN):
    return [sys.executable, str(ROOT / f'launch/{name}.py'), *flags, '--', *run]


def launch(name, *flags, run=RUN, stubs=None):
    return subprocess.run(command(name, *flags, run=run), cwd=ROOT, env=environment(stubs), capture_output=True, text=True, check=False,
                          timeout=600)


def dry(name, *flags, run=RUN):
    done = launch(name, *(flags or FLAGS[name]), '--dry_run', run=run)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done.stdout


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_shell(text):
    return subprocess.run(['bash', '-n'], input=text, text=True, check=False).returncode == 0


def test_slices_are_counted_as_google_does():
    cases = {'v5p:4x4x4': (64, 16, 'v5p-128'), 'v5e:16x16': (256, 64, 'v5litepod-256'), 'v6e:8x8': (64, 16, 'v6e-64'),
             'v6e:2x4': (8, 1, 'v6e-8'), 'v4:2x2x1': (4, 1, 'v4-8'), 'v5e:1x1': (1, 1, 'v5litepod-1')}
    for topology, wanted in cases.items():
        tpu = slices.parse(topology)
        assert (tpu.chips, tpu.hosts, tpu.accelerator_type) == wanted


def test_tpu_vm_prints_what_it_runs():
    text = dry('tpu_vm')
    assert is_shell(text)
    for part in ('--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot', '--worker=all', '--distributed',
                 'secrets=(HF_TOKEN)', "uv pip install -q '.[tpu]'"):
        assert part in text


def test_tpu_vm_makes_a_slice_and_goes_on_after_a_preemption(stubs):
    (stubs / 'states').write_text('ABSENT CREATING UNKNOWN READY PREEMPTED CREATING READY')
    (stubs / 'ends').write_text('now 143 0')
    done = launch('tpu_vm', *FLAGS['tpu_vm'], stubs=stubs)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith('finished')
    runs = lines(stubs / 'runs')
    assert [run[:2] for run in runs] == [[[*RUN, '--distributed'], SECRET]] * 4  # two workers, twice
    calls = lines(stubs / 'calls')
    managed = [call[3] for call in calls if call[2] == 'queued-resources' and call[3] != 'describe']
    assert managed == ['create', 'delete', 'create']
    assert SECRET not in (stubs / 'calls').read_text() + done.stdout + done.stderr
    for home in (stubs / 'home0', stubs / 'home1'):
        assert (home / 'prepared').read_text() == "it's ready\n"
        assert [path.read_text() for path in home.glob('qedjax/logs/qed-*.log')] == ['at work\n']
        assert not (home / 'qedjax/run.sh').exists()
        assert all((pathlib.Path(run[3]) / 'launch/sft.py').is_file() for run in runs)
    assert (stubs / 'home0/qedjax').stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(('ends', 'code', 'starts'), [('now 2', 2, 1), ('now 1 0', 0, 2), ('now 1', 1, 2)])
def test_tpu_vm_starts_again_what_failed_but_not_what_was_refused(stubs, ends, code, starts):
    (stubs / 'states').write_text('READY')
    (stubs / 'ends').write_text(ends)
    done = launch('tpu_vm', *FLAGS['tpu_vm'], '--restarts=1', stubs=stubs)
    assert done.returncode == code, done.stderr
    assert len(lines(stubs / 'runs')) == 2 * starts


@pytest.mark.parametrize('fault', ['uv', 'tar', 'prepare'])
def test_tpu_vm_starts_nothing_where_a_worker_is_not_ready(stubs, fault):
    (stubs / 'states').write_text('READY')
    if fault != 'prepare':
        (stubs / 'bin' / fault).write_text('#!/bin/sh\nexit 1\n')
        (stubs / 'bin' / fault).chmod(0o755)
    prepare = 'false || { false && true; }' if fault == 'prepare' else ':'
    done = launch('tpu_vm', *FLAGS['tpu_vm'], '--restarts=0', f'--prepare={prepare}', stubs=stubs)
    assert done.returncode == 1
    assert 'could not start' in done.stderr
    assert not (stubs / 'runs').exists()


def test_tpu_vm_takes_up_a_run_that_is_under_way(stubs):
    (stubs / 'states').write_text('READY')
    (stubs / 'ends').write_text('release 0')
    first = subprocess.Popen(command('tpu_vm', *FLAGS['tpu_vm']), cwd=ROOT, env=environment(stubs), stderr=subprocess.DEVNULL,
                             start_new_session=True)
    while len(lines(stubs / 'runs')) < 2:
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, 15)  # with its shell, as Ctrl-C does
    first.wait()
    second = subprocess.Popen(command('tpu_vm', *FLAGS['tpu_vm']), cwd=ROOT, env=environment(stubs), stderr=subprocess.PIPE, text=True)
    assert any('under way' in line for line in second.stderr)
    (stubs / 'release').touch()
    assert 'finished' in second.communicate()[1]
    assert second.returncode == 0
    assert len(lines(stubs / 'runs')) == 2


def test_a_run_on_a_tpu_vm_is_stopped_by_a_signal_to_its_group(stubs):
    (stubs / 'states').write_text('READY')
    (stubs / 'ends').write_text('never 0')
    first = subprocess.Popen(command('tpu_vm', *FLAGS['tpu_vm']), cwd=ROOT, env=environment(stubs), stderr=subprocess.DEVNULL,
                             start_new_session=True)
    while len(lines(stubs / 'runs')) < 2 or not (stubs / 'home1/qedjax/pid').exists():
        time.sleep(0.1)
    os.killpg(first.pid, 15)
    first.wait()
    for home in (stubs / 'home0', stubs / 'home1'):
        subprocess.run(['bash', '-c', STOP], env={**os.environ, 'HOME': str(home)}, check=True)
        while not (home / 'qedjax/exit').exists():
            time.sleep(0.1)
        time.sleep(0.1)
        assert (home / 'qedjax/exit').read_text() == '143\n'


def test_tpu_vm_leaves_slices_alone_without_create(stubs):
    (stubs / 'states').write_text('PREEMPTED')
    done = launch('tpu_vm', '--name=qed', '--topology=v6e:4x4', '--zone=us-east5-b', '--poll=1', stubs=stubs)
    assert done.returncode == 1
    assert '--create' in done.stderr
    assert {call[3] for call in lines(stubs / 'calls')} == {'describe'}


def test_gke_manifest(stubs):
    manifest = json.loads(dry('gke'))
    assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert manifest['spec']['failurePolicy']['maxRestarts'] == 100
    [job] = [replicated['template']['spec'] for replicated in manifest['spec']['replicatedJobs']]
    assert (job['completionMode'], job['completions'], job['parallelism'], job['backoffLimit']) == ('Indexed', 2, 2, 0)
    pod = job['template']['spec']
    assert pod['restartPolicy'] == 'Never'
    assert pod['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice', 'cloud.google.com/gke-tpu-topology': '2x2x2'}
    [container] = pod['containers']
    assert container['resources']['limits'] == {'google.com/tpu': 4}
    assert container['envFrom'] == [{'secretRef': {'name': 'tokens'}}]
    shell = container['command'][2]
    assert '$(' not in shell.replace('$$(', '')  # Kubernetes fills in what it knows
    assert is_shell(shell.replace('$$(', '$('))


def test_gke_runs_the_command_as_it_was_given(stubs):
    done = launch('gke', '--name=qed', '--topology=v5p:2x2x2', '--claim=shared', stubs=stubs)
    assert done.returncode == 0, done.stderr
    assert (stubs / 'words').read_text().split() == ['apply', '-f', '-']
    manifest = json.loads((stubs / 'stdin').read_text())
    pod = manifest['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
    shell = pod['containers'][0]['command'][2].replace('$$(', '$(')
    assert subprocess.run(['bash', '-c', shell], env=environment(stubs), check=False).returncode == 0
    assert lines(stubs / 'runs')[0][0] == [*RUN, '--distributed']


def test_slurm_script(stubs):
    text = dry('slurm')
    assert is_shell(text)
    settings = [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith('#SBATCH')]
    assert {'--nodes=2', '--ntasks-per-node=1', '--gpus-per-node=4', '--requeue', '--signal=B:USR1@300', '--partition=gpu',
            '--time=1-00:00:00'} <= set(settings)
    done = launch('slurm', *FLAGS['slurm'], f'--logs={stubs}/logs', stubs=stubs)
    assert done.returncode == 0, done.stderr
    assert (stubs / 'logs').is_dir()
    assert SECRET not in (stubs / 'stdin').read_text()


def batch(stubs, srun):
    """Runs the batch script with this srun, patience shortened; returns it and the file of what was asked of Slurm."""
    text = dry('slurm').replace(f'command=({sys.executable} ', 'command=(python ').replace('patience=240', 'patience=1')
    note = 'echo "${0##*/} $*" >> "$STUBS/asked"'
    for name, body in {'srun': srun, 'scancel': f'{note}; kill "$(cat "$STUBS/step")"', 'scontrol': note}.items():
        (stubs / 'bin' / name).write_text(f'#!/bin/bash\n{body}\n')
        (stubs / 'bin' / name).chmod(0o755)
    return subprocess.Popen(['bash', '-c', text], env=environment(stubs) | {'SLURM_JOB_ID': '17'}, stdout=subprocess.DEVNULL)


def test_slurm_runs_the_command_as_it_was_given(stubs):
    job = batch(stubs, 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    assert job.wait(300) == 0
    [[words, secret, devices, _]] = lines(stubs / 'runs')
    assert (words, secret, devices) == ([*RUN, '--distributed'], SECRET, '0,1,2,3')
    assert not (stubs / 'asked').exists()


@pytest.mark.parametrize('heeds', [True, False])
def test_slurm_asks_for_its_next_turn(stubs, heeds):
    """Whether the processes end when they are told to, or are still there when the time is over."""
    begin = 'echo $$ > "$STUBS/new" && mv "$STUBS/new" "$STUBS/step"; '
    job = batch(stubs, begin + 'exec sleep 30' if heeds else f'trap "" TERM; {begin} for i in 1 2 3 4; do sleep 1; done')
    while not (stubs / 'step').exists():
        time.sleep(0.05)
    job.send_signal(10)
    assert job.wait(300) == (143 if heeds else 0)
    asked = (stubs / 'asked').read_text().splitlines()
    assert asked[:2] == ['scancel --signal=TERM 17', 'scontrol requeue 17']


@pytest.mark.parametrize(('name', 'change', 'run', 'reason'), [
    ('tpu_vm', '--topology=v5p:3x3x3', RUN, 'v5p:3x3x3 is no slice of v5p'),
    ('gke', '--topology=v9:2x2', RUN, 'generations are'),
    ('tpu_vm', '--env=NOT_SET_HERE', RUN, 'NOT_SET_HERE'),
    ('tpu_vm', f'--env=HF_TOKEN={SECRET.replace(",", "")}', RUN, 'bare names'),
    ('slurm', '--time=soon', RUN, 'as sbatch takes it'),
    ('slurm', '--option=partition gpu', RUN, 'one word'),
    ('gke', '--name=Not a name', RUN, 'lower-case'),
    ('slurm', '--nodes=2', ('launch/none.py',), 'launch/none.py'),
    ('slurm', '--nodes=2', (), "'nothing'"),
    ('slurm', '--nodes=2', ('launch/generate.py', '--n=1'), 'runs in one process'),
    ('tpu_vm', '--poll=1', ('launch/sft.py', '--workdir', 'runs/sft'), 'absolute'),
    ('tpu_vm', '--poll=1', (*RUN, 'two\nlines'), 'line break'),
    ('tpu_vm', '--commit=nowhere', RUN, 'no commit'),
])
def test_what_is_wrong_is_said_in_one_sentence(name, change, run, reason):
    done = launch(name, *FLAGS[name], change, '--dry_run', run=run)
    assert done.returncode == 2
    assert done.stdout == ''
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith('error: ')
    assert reason in sentence
    assert SECRET not in done.stderr


def test_one_host_needs_no_distributed():
    assert '--distributed' not in dry('slurm', '--name=qed', '--time=60', run=('launch/generate.py', '--n=1'))


def commands_of(page):
    """Commands that begin with `python launch/` in the code blocks of a page."""
    text = (ROOT / 'docs' / page).read_text().replace('\\\n', ' ')
    return re.findall(r'^    python (launch/.*)$', text, re.MULTILINE)


def config_of(words):
    values = flags.FlagValues()
    argv = ['test', *(word for word in words if word.startswith('--config'))]
    config_flags.DEFINE_config_file('config', lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def devices_of(words):
    given = dict(word[2:].split('=', 1) for word in words if word.startswith('--') and '=' in word)
    if 'topology' in given:
        tpu = slices.parse(given['topology'])
        return tpu.chips, tpu.hosts
    return int(given.get('nodes', 1)) * 8, int(given.get('nodes', 1))


@pytest.mark.parametrize('page', ['tpu_vm.md', 'gpu.md'])
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # of ml_collections
def test_commands_of_the_pages_are_sound(page, stubs):
    """They launch, and their configs fit the machines that they name."""
    known = environment(stubs) | {'ZONE': 'us-east5-a', 'PREPARE': ':', 'GRADER': '10.0.0.7', 'SUMMARISER': '10.0.0.8', 'SHARED': '/shared',
                                  'OPENAI_API_KEY': SECRET}
    for text in commands_of(page):
        subprocess.run(['bash', '-euc', f'python {text}'], env=known, check=True, stdout=subprocess.DEVNULL)
    found = [run[0] for run in lines(stubs / 'runs')]
    assert len(found) == 4
    for words in found:
        if '--' in words:
            done = subprocess.run([sys.executable, words[0], '--dry_run', *words[1:]], cwd=ROOT, env=known, capture_output=True, text=True,
                                  check=False)
            assert done.returncode == 0, done.stderr
        cfg, (devices, hosts) = config_of(words), devices_of(words)
        rows = cfg.micro_rows if isinstance(cfg, RLConfig) else cfg.batch_size // cfg.accumulation
        (validate_rl if isinstance(cfg, RLConfig) else validate)(cfg)
        assert math.prod((cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.context, cfg.mesh.tensor)) == devices
        assert rows % cfg.mesh.fsdp == cfg.row_length % cfg.mesh.context == 0
        if isinstance(cfg, RLConfig):
            shards = devices // hosts // cfg.tensor
            assert cfg.engine.slots % shards == cfg.engine.staged % shards == 0
    if page == 'tpu_vm.md':
        assert STOP in (ROOT / 'docs' / page).read_text()
