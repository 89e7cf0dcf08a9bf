"""How ranks exchange bytes: one small protocol, spoken by a world of one (`solo`) and over MPI (`mpi`).

The only package that knows mpi4py. `connect` picks the implementation, `thread` runs the data plane beside
the computation, `failure` ends all ranks when one fails.
"""
