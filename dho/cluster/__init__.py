"""Stages `train` and `teach` as a PyTorchJob on Kubernetes (`dho launch`, `dho jobs`, `dho logs`, `dho stop`).

In the order of a launch: `manifest` renders k8s/, `rules` (with `schema`) refuses what could not run, `api` talks to the API server,
`follow` watches the job, `reasons` says why one does not start, `launcher` puts them together. Importing this package imports none of them.
"""
