"""Runs of the launch scripts on machines elsewhere: the text that starts them, for TPU VMs, GKE and Slurm."""
