"""Stages `train` and `teach` as a job on Kubernetes (`dho launch`, `dho jobs`, `dho logs`, `dho stop`).

In the order of a launch: `job` says what is asked for and what a kind of job is (`pytorchjob` is one), `manifest`
renders k8s/, `checks` (with `schema`) refuses what could not run, `api` talks to the API server, `follow` (with
`watch`) follows the job, `reasons` says why one does not start, `launcher` puts them together. `revision` names what a
job works from, `pod` is what its pods run. Importing this package imports none of them.
"""
