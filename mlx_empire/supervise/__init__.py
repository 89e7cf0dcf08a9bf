"""What keeps a run alive: starting it under mpirun, stopping it on request, watching its ranks, starting it again."""
