"""A run on a TPU slice of GKE: the manifest of a JobSet, one pod a host, which is started anew as a whole when a host is lost."""

import shlex
from collections.abc import Sequence
from typing import Any

from qedjax.clusters.slices import Slice


def manifest(name: str, tpu: Slice, command: Sequence[str], *, claim: str, mount: str, image: str, repository: str = '', commit: str = '',
             secret: str = '', spot: bool = False, restarts: int = 100) -> dict[str, Any]:
    """The manifest as a dict; its JSON is YAML too.

    Args:
      name: of the JobSet.
      tpu: the slice that its node pool has.
      command: of every pod, python first.
      claim, mount: a PersistentVolumeClaim that all pods can write to, and where they find it.
      image: of the container. repository, commit: code to be installed in it; without them it is in the image's working folder.
      secret: Kubernetes Secret whose entries become the environment of the pods; the manifest holds no value of it.
      spot: whether the node pool is of spot machines.
      restarts: of the whole, for any reason but one that a user must mend (exit code 2).
    """
    container = {
        'name': 'qedjax',
        'image': image,
        'command': ['bash', '-c', _shell(command, repository, commit).replace('$(', '$$(')],  # Kubernetes would fill in $(NAME)
        'ports': [{'containerPort': port} for port in (8471, 8482)],  # the TPU runtime's, jax's coordinator's
        'resources': {'limits': {'google.com/tpu': tpu.chips // tpu.hosts}},
        'volumeMounts': [{'name': 'shared', 'mountPath': mount}],
        'envFrom': [{'secretRef': {'name': secret}}] if secret else [],
    }
    job = {
        'completionMode': 'Indexed', 'completions': tpu.hosts, 'parallelism': tpu.hosts, 'backoffLimit': 0,
        'podFailurePolicy': {'rules': [
            {'action': 'FailJob', 'onExitCodes': {'containerName': 'qedjax', 'operator': 'In', 'values': [2]}}]},
        'template': {'spec': _pod(tpu, container, claim, spot)},
    }
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
        # All pods on one node pool, which is one slice.
        'metadata': {'name': name, 'annotations': {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}},
        'spec': {
            'failurePolicy': {'maxRestarts': restarts, 'rules': [
                {'name': 'refused', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]},
            'replicatedJobs': [{'name': 'slice', 'replicas': 1, 'template': {'spec': job}}],
        },
    }


def _pod(tpu: Slice, container: dict[str, Any], claim: str, spot: bool) -> dict[str, Any]:
    pod: dict[str, Any] = {
        'restartPolicy': 'Never',
        'terminationGracePeriodSeconds': 120,
        'nodeSelector': {'cloud.google.com/gke-tpu-accelerator': tpu.gke_accelerator, 'cloud.google.com/gke-tpu-topology': tpu.shape},
        'containers': [container],
        'volumes': [{'name': 'shared', 'persistentVolumeClaim': {'claimName': claim}}],
    }
    if spot:
        pod['nodeSelector']['cloud.google.com/gke-spot'] = 'true'
        pod['tolerations'] = [{'key': 'cloud.google.com/gke-spot', 'operator': 'Equal', 'value': 'true', 'effect': 'NoSchedule'}]
    return pod


def _shell(command: Sequence[str], repository: str, commit: str) -> str:
    """What the container runs; the script takes the place of the shell, so that it gets the signals."""
    lines = ['set -euo pipefail']
    if repository:
        lines += [f'git clone -q {shlex.quote(repository)} /qedjax', 'cd /qedjax', f'git checkout -q {shlex.quote(commit)}',
                  "pip install -q '.[tpu]'"]
    return '\n'.join([*lines, f'exec {shlex.join(command)}', ''])
