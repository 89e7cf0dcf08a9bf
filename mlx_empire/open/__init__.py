"""The runs of a folder as pages in a browser, while they go on; or one of them as a file."""
