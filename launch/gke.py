"""Runs a launch script on a TPU slice of GKE, as a JobSet; pods that are lost come again and go on from the workdir.

python launch/gke.py --name=sft --topology=v5p:4x4x4 --repository=https://github.com/ORG/qedjax --claim=shared --secret=qedjax \\
    -- launch/sft.py --config=configs/qed_nano_sft.py:v5p-64 --config.init=/mnt/shared/MODEL --workdir=/mnt/shared/sft

Needs kubectl with a cluster that has JobSet 0.6 or newer and a node pool of that topology. docs/tpu_vm.md has what comes before.
"""

import json
import subprocess
import sys

from absl import flags

from qedjax import cli
from qedjax.clusters import command, gke, slices

NAME = flags.DEFINE_string('name', None, 'Name of the JobSet.', required=True)
TOPOLOGY = flags.DEFINE_string('topology', None, 'Generation and shape of the slice, e.g. v5p:4x4x4.', required=True)
CLAIM = flags.DEFINE_string('claim', None, 'PersistentVolumeClaim that all pods can write to: the workdir is there.', required=True)
MOUNT = flags.DEFINE_string('mount', '/mnt/shared', 'Where the pods find it.')
REPOSITORY = flags.DEFINE_string('repository', '', 'Address to clone the code from; by default the image has it in its working folder.')
COMMIT = flags.DEFINE_string('commit', 'HEAD', 'Commit to check out there; HEAD is that of this clone, which must have been pushed.')
IMAGE = flags.DEFINE_string('image', 'python:3.12', 'Image of the pods; with bash, git and pip if --repository is given.')
SECRET = flags.DEFINE_string('secret', '', 'Kubernetes Secret whose entries become the environment of the pods.')
SPOT = flags.DEFINE_bool('spot', False, 'The node pool is of spot machines.')
RESTARTS = flags.DEFINE_integer('restarts', 100, 'Restarts of the whole; preemptions count.', lower_bound=0)
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print the manifest that would be applied, and do nothing.')


def main(argv: list[str]) -> None:
    command.require_name(NAME.value)
    tpu = slices.parse(TOPOLOGY.value)
    run = command.script_command(argv[1:], tpu.hosts, absolute=True)
    commit = command.resolve_commit(COMMIT.value) if REPOSITORY.value else ''
    manifest = gke.manifest(NAME.value, tpu, ['python', *run], claim=CLAIM.value, mount=MOUNT.value, image=IMAGE.value,
                            repository=REPOSITORY.value, commit=commit, secret=SECRET.value, spot=SPOT.value, restarts=RESTARTS.value)
    text = json.dumps(manifest, indent=2) + '\n'
    if DRY_RUN.value:
        print(text, end='')
    else:
        sys.exit(subprocess.run(['kubectl', 'apply', '-f', '-'], input=text, text=True, check=False).returncode)


if __name__ == '__main__':
    cli.run(main, words=True)
