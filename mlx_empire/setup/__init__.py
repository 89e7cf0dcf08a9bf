"""What makes machines ready for a run over ssh: keys, known hosts, and the same environment at the same path."""
