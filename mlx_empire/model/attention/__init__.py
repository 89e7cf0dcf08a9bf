"""How attention of long rows is computed: which mask it is, what is computed of it, and by which kernel."""
