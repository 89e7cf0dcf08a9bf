"""The runs of a folder: a table of them, two beside each other, and what may go. Reads them, and never owns one."""
