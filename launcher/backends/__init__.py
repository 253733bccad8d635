"""One file for each way to start: here, torchrun, Slurm, Kubernetes, Ray, MPI."""
