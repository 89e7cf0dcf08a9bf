"""Weights in and out: reading Hugging Face folders unit by unit, and exporting folders that others open.

May import `supervise` and what stands below it: `evaluate`, `engine`, `optim`, `adapters`, `data`, `comm`,
`plan`, `cluster`, `recipe`, `errors`. Only safetensors and JSON are read or written; code in a model folder
is never run.
"""
