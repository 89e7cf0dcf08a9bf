"""A run as a page: what its folder tells, as documents, charts and HTML. Reads the folder, and never owns the run.

`open` serves it while the run goes on, and a run that ends leaves it as one file, `report.html`.
"""
