"""A finished or foreign model's scores on sets of questions, beside those of its base or of another one."""
