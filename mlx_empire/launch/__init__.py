"""What keeps a run alive: starting it under mpirun, watching its ranks, starting it again."""
