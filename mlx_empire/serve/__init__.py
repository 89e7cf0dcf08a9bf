"""Finished daughters answer over HTTP, all on one resident base."""
