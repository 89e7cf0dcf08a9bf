"""A finished result answers, alone or beside its base."""
