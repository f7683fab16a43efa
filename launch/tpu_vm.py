"""Runs a launch script on all workers of a TPU VM slice, and again after a preemption; the workdir tells it where to go on.

python launch/tpu_vm.py --name=qed --topology=v5p:4x4x4 --zone=us-east5-a --create --spot --env=HF_TOKEN \\
    --prepare='mountpoint -q /mnt/shared || sudo mount -m ADDRESS:/share /mnt/shared' --logs=/mnt/shared/logs \\
    -- launch/sft.py --config=configs/qed_nano_sft.py:v5p-64 --config.init=/mnt/shared/MODEL --workdir=/mnt/shared/sft

Sends the committed code, installs it, starts the script in the background and watches it. Ctrl-C ends the watching alone; the same
command takes it up again. docs/tpu_vm.md is the whole way.
"""

import subprocess
import sys

from absl import flags, logging

from qedjax import cli
from qedjax.clusters import command, slices, tpu_vm

NAME = flags.DEFINE_string('name', None, 'Name of the slice.', required=True)
TOPOLOGY = flags.DEFINE_string('topology', None, 'Generation and shape of the slice, e.g. v5p:4x4x4.', required=True)
ZONE = flags.DEFINE_string('zone', None, 'Zone of the slice.', required=True)
PROJECT = flags.DEFINE_string('project', '', "Google Cloud project; gcloud's own by default.")
CREATE = flags.DEFINE_bool('create', False, 'Make the slice where there is none, and again after it was taken.')
SPOT = flags.DEFINE_bool('spot', False, 'Make it a spot slice: cheaper, and it may be taken at any time.')
ENV = flags.DEFINE_list('env', [], 'Names of variables that the workers get from this environment, e.g. HF_TOKEN,OPENAI_API_KEY.')
PREPARE = flags.DEFINE_string('prepare', ':', 'Shell text that every worker runs before a start, say to mount a disk; its status must be 0')
LOGS = flags.DEFINE_string('logs', 'logs', 'Folder of the logs on the workers, in ~/qedjax unless absolute.')
COMMIT = flags.DEFINE_string('commit', 'HEAD', 'Commit of this repository that is sent.')
RESTARTS = flags.DEFINE_integer('restarts', 10, 'Starts after a failure before it gives up; preemptions do not count.', lower_bound=0)
POLL = flags.DEFINE_integer('poll', 60, 'Seconds from one look at the slice to the next.', lower_bound=1)
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print the shell script that would be run, and do nothing.')


def main(argv: list[str]) -> None:
    command.require_name(NAME.value)
    tpu = slices.parse(TOPOLOGY.value)
    run = command.script_command(argv[1:], tpu.hosts, absolute=True)
    command.require_environment(ENV.value)
    if SPOT.value and not CREATE.value:
        raise ValueError('--spot is how a slice is made; it comes with --create')
    if command.uncommitted():
        logging.warning('what is not committed is not sent')
    text = tpu_vm.script(NAME.value, tpu, run, zone=ZONE.value, commit=command.resolve_commit(COMMIT.value), project=PROJECT.value,
                         create=CREATE.value, spot=SPOT.value, secrets=ENV.value, prepare=PREPARE.value, logs=LOGS.value,
                         restarts=RESTARTS.value, poll=POLL.value)
    if DRY_RUN.value:
        print(text, end='')
    else:
        sys.exit(subprocess.run(['bash', '-c', text], check=False).returncode)


if __name__ == '__main__':
    cli.run(main, words=True)
